"""What a model does, measured: graders, behaviours, and the statistics that go with every number."""
