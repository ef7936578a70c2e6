"""Behind fastconv.convolutionize: the heads of a graph, what they become, and the layers for it."""
