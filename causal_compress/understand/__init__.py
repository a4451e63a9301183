"""The network as a chain, what interventions do along it, and which neighbouring sites are equivalent."""
