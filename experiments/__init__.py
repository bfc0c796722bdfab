"""Language models with fast-weight product key memories: training and evaluation. python -m experiments --help"""
