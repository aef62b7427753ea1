"""The batched engine: groups, memory, the stages of a step (predict, errors, messages, gradients), and the program."""
