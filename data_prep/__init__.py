"""Data preparation: open web datasets in, Megatron .bin/.idx shards out (docs/contract.md, section 5)."""

__version__ = "0.1.0"
