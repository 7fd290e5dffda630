"""What computes: PyTorch and Triton code for each operator, and nothing that picks a device."""

if __name__ != "nsa_port.kernels":
    raise ImportError(f"import nsa_port.kernels, not {__name__}: the folder is part of nsa_port")
