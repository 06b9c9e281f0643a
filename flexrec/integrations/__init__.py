"""FlexRec inside other trainers and engines. What is not installed is missed when it is used, and then by name."""
