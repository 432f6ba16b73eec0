"""MQTT 3.1.1 and 5: a codec that does no I/O, and the endpoint that terminals connect to.

It is an endpoint for devices, not a broker: nothing goes from one device to another. It knows
topics and payload bytes; what is in a payload is its `Gateway`'s business.
"""
