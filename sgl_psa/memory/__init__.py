"""One KV pool for all layers: frames near the compute, all of K and V on the host tier."""
