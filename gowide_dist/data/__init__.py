"""Datasets as FFCV files: encoded once, then streamed to every process. FFCV is touched in this folder alone.

What FFCV gives is its file format (stock FFCV reads our files) and its C library (JPEG decoding and resizing). Its
Python package is not imported: doing so compiles for 4 s in every process and sets torch's threads, an exception in
its loader's thread hangs the consumer, and its shuffled epochs cannot be shared exactly between processes.
"""
