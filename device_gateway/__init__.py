"""Everything between a terminal's socket and its device session: MQTT, topics, wire, registry.

What a request means for money and cards does not live here; it is handed to the capabilities.
"""
