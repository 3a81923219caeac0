"""From measured iterations to latency models: fitting, transfer, memory and engine starts."""
