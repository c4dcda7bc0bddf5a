"""Measurements on pixels and samples, independent of any network."""
