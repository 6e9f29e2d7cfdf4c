"""The gateway: it holds the sockets of many services and lets the services sleep. `gateway.server` tells the story."""

__version__ = "0.1.0"
