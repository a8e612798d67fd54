"""Score a policy file as a run does at its end: 50 episodes, on Procgen 200 on unseen and 200 on training levels.

    python benchmark/score.py teachers/Hopper-v4.pt
    python benchmark/score.py teachers/Hopper-v4.pt --seed 200 --write

--write puts the score into the policy file, and into the result file beside it (teachers/Hopper-v4.json).
"""

import argparse
import json
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import train_teacher  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="a policy file, teacher or student")
    parser.add_argument("--seed", type=int, default=100, help="seed of the episodes (default: 100)")
    parser.add_argument("--write", action="store_true", help="renew the score in the files")
    arguments = parser.parse_args()
    policy = train_teacher.load("policy", arguments.policy, "a policy file", format=1)
    suite = policy["suite"]
    names = ("num_levels", "start_level", "distribution_mode")
    levels = {name: policy["args"][name] for name in names if name in policy["args"]}  # only on Procgen
    args = train_teacher.Args(env_id=policy["env_id"], seed=arguments.seed, **levels)
    args.eval_episodes = train_teacher.SETTINGS[suite].get("eval_episodes", 50)
    actor, _ = train_teacher.make_networks(policy["network"])
    actor.load_state_dict(policy["actor"])
    if suite == "continuous":
        torch.set_num_threads(1)  # torch's waiting threads would take the cores from the environments
    score = train_teacher.score_policy(actor, args)
    for name, scored in (score if suite == "procgen" else {"score": score}).items():
        human = f", human-normalized {scored['human_normalized']:.3f}" if "human_normalized" in scored else ""
        print(f"{name}: {scored['mean']:.2f} ± {scored['std']:.2f} over {args.eval_episodes} episodes{human}")
    if arguments.write:
        train_teacher.save(arguments.policy, {**policy, "score": score})
        path = os.path.splitext(arguments.policy)[0] + ".json"
        with open(path) as file:
            result = json.load(file)
        with open(path, "w") as file:
            json.dump({**result, "teacher": score}, file, indent=2)


if __name__ == "__main__":
    main()
