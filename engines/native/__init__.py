"""The engine's own CPU kernels (C++, C ABI) and their Python signatures. `src/common.h` says how they are built up."""
