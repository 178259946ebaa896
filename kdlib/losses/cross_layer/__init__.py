"""Losses that compare several layers of the student with several layers of the teacher."""
