"""Networks of our own: ``--base NAME`` is the module NAME in here, for names that are not torchvision's.

A module has ``build()``, which gives a network from normalised images to ``FEATURES`` numbers each; ``NORMALISATION``,
what it expects of them; ``URL``, its ImageNet weights, or None; ``UNUSED``, how the names of the weights begin that it
does not take; and ``renamed(state)``, which gives the published weights its own names and shapes.
"""
