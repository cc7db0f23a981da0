"""Datasets in FFCV's file format; of FFCV itself one C symbol is used, `imdecode` (JPEG decoding).

Stock FFCV reads the files written here, and `encode` reads files written by stock FFCV. FFCV's Python package is not
imported: that compiles for 4 s in every process and sets torch's threads, an exception in its loader's thread hangs the
consumer, and its shuffled epochs cannot be split exactly between processes.
"""
