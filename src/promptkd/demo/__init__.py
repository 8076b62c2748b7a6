"""The main job on embedded defaults: tune a 135M teacher, prune it, distill with PromptKD, and report."""
