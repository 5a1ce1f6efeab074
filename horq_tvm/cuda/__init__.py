"""Machine code for cards, made without one.

toolkit.py        finds nvcc and asks it what it compiles for
fatbin.py         source → one fatbin of several architectures, and what each kernel takes of registers and memory
driver.py         TVM's CUDA runtime where there is no driver
architectures.py  what a multiprocessor of each architecture has
disassembly.py    the instructions of a fatbin
"""
