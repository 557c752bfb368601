"""Blocks at work: streams of hidden states, captured calls, statistics, tasks."""
