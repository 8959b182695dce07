"""The CPU platform: what SGLang asks of a machine without an accelerator.

SGLang imports this module while it imports itself, so everything but the platform's base classes
is imported where it is used.
"""

from __future__ import annotations

from sglang_psa.compat import CpuDeviceMixin, PlatformEnum, SRTPlatform


class PSACpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Torch-native attention unless asked otherwise, and paged KV without Triton."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        """The backend of a server that names none."""
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        """SGLang's plain pool; the psa backend brings its own."""
        from sglang_psa.compat import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        """An allocator in torch: SGLang's needs Triton."""
        from sglang_psa.allocator import CpuPagedAllocator

        return CpuPagedAllocator
