"""The trainer: phases, data order, DeepSpeed engine, checkpoints, health, tracking, plan and release."""
