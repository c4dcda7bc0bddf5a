"""The streaming engine: clock, noise, schedules, rollout, state, decoding and the clip writer."""
