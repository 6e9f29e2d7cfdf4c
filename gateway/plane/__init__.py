"""The data plane: worker processes that own the connections. No asyncio here, and nothing of the control plane."""
