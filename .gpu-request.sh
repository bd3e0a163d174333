#!/bin/bash
# Do the CUDA kernels of trellis4 (3 kernels, prebuilt) and Triton's of all trellis codes agree with the reference, and how fast are they? About 120 s.
set -u
xz -dkc gpu-carry/a.so.xz > /tmp/a.so && export PUZZLEMOE_CUDA_LIBRARY=/tmp/a.so PYTHONPATH=$PWD:$PWD/tests
timeout 100 python3 gpu-carry/check.py trellis4
timeout 70 python3 -m pytest -q tests/backends/test_triton.py -k "test_every_code and trellis" 2>&1 | grep -vE "s (call|setup|teardown)" | tail -15
