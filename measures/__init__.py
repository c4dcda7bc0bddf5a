"""What can be told of any film from its frames and samples alone, and a picture of it."""
