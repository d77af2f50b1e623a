"""What several test files need: the contract in numpy, seeded inputs, and child processes."""
