# SPDX-License-Identifier: Apache-2.0
"""Data of the source form: code, tests and texts that go into other trees."""
