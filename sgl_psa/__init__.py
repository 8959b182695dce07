"""Progressive Sparse Attention: the method, independent of any server.

Tensors, pages and requests in; attention output and a record of what was read out. Nothing here
imports SGLang. Start with :mod:`sgl_psa.wrapper` for the one face that backends see, and
:mod:`sgl_psa.config` for every knob.
"""
