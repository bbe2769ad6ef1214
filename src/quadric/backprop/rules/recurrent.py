"""Recurrent cells that a kernel fuses."""
