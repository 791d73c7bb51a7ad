"""Closed-form repair of a patched model towards its teacher: neurons matched and ordered, projections solved again."""
