"""What is measured: each workload turns options into jobs, and one job into raw figures."""
