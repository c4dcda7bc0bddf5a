"""The streaming engine: clock, noise, schedules, rollout, state, decoding and sinks."""
