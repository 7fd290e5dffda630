"""One small file per backend: what it can run, and which kernels it calls."""

if __name__ != "nsa_port.backends":
    raise ImportError(f"import nsa_port.backends, not {__name__}: the folder is part of nsa_port")
