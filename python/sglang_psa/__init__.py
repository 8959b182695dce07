"""Progressive Sparse Attention as an SGLang plugin: everything here touches SGLang."""
