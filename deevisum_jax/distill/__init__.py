"""Multi-stage distillation: what a student learns from frozen teachers, online or cached."""
