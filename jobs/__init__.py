"""Many clips, on one machine or many: jobs, what is kept of them meanwhile, and who makes them."""
