"""HOW is it computed? Engines: one that is obviously right, and one that leaves out what is exactly zero.

Ten words that this room uses, each for one thing:

- task: the graph, which nodes are clamped, and the rules, whatever the numbers; hashable, and what plans are kept by
- batch: the numbers of one run
- state: where a run has left the network
- live: of an error, that it may differ from zero
- active: of a node at a step, that its error is live and its precision is not zero, so that it counts
- phase: what is computed together, at one step or for learning
- plan: a task's phases
- kernel: forward pass, message and weight gradient of one type of module, by hand
- group: nodes in one tensor, or edges in one kernel call; a member is a row
- program: a plan's operations, bound to their tensors for one batch size

What lies where: ``problem`` (task, batch, state), ``engine`` (what can be asked), ``local_rules`` (SPEC §2 and §4 node
by node, by autograd), ``reference`` (a loop over them: the oracle), ``reading`` (what nodes and edges show),
``planning`` (wiring, liveness, plan), ``kernels`` (one file a family), and ``batched`` (groups, places, the four stages
predict, errors, messages and gradients, and the program).
"""
