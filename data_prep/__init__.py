"""Data preparation: open web datasets in, Megatron .bin/.idx shards out (docs/contract.md, section 5)."""
