"""Events in and out over NATS JetStream: the relay of the outboxes, the consumers, dead letters.

The only room that speaks NATS. What an event does to money, trials or merchants is not decided
here: the capabilities write their own events into an outbox (`glamd.outbox`), and `handlers` calls
the one whose effect a consumed event is. Spec 3 is the contract.
"""
