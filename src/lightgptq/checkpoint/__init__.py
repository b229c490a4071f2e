"""Bytes on disk: packing, configs, lazy reading and streaming writing of checkpoints."""
