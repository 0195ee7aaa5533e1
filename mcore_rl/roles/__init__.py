"""The models of a run by their role: policy, reference, critic, reward model, discriminator."""
