"""A study: many policies of one comparison, trained under the same search, with claims that their results confirm or do not.

config      the YAML file of a study -> arms, search points, seeds, claims
shared      `SeedRun` with stages that all policies of a study share
engine      trains what is missing, in several processes
costs       floating-point operations of an arm
frontiers   frontiers of reward against KL, the area between two, verdicts on claims
results     results.json, results.csv
page        study.html
"""
