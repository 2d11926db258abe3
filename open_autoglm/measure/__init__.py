"""Measuring: isolated children, the device lease, workloads and statistics."""
