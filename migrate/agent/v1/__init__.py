"""Generated from proto/tcpmig/v1 by scripts/generate; do not edit."""
