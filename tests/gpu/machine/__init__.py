"""A fake machine with eight GPUs: CUDA tensors without values, on a CPU build of torch.

torch's ``FakeTensorMode`` computes shapes, dtypes and devices only, and refuses an operation on
tensors of different devices. With a few lines of C++ for autograd (``fake_cuda.cpp``) and the
Python functions of ``torch.cuda`` replaced, the product runs its GPU path: on one rank of any
parallel layout, without its peers. Each place where the host would wait for the device is recorded.

- ``library.py``: the compiled C++ part
- ``devices.py``: ``torch.cuda``
- ``host_waits.py``: places where the host waits, and devices that are used
- ``attention.py``: the choice of attention kernels
- ``collectives.py``: process groups whose collectives return at once
- ``rank.py``: one rank of the machine; entry point for code that runs on it
- ``process.py``: the process that such code is forked from

Not modelled: values, kernels, streams, memory, NCCL, ``torch.compile`` (functions run uncompiled).
"""
