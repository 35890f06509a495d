"""Instructions in other words: for the disturbance `paraphrase`.

Meta-World's tasks have sentences written for each, which change verb, noun or order and keep what is asked.  Any other instruction is
said more politely, which every instruction can be.
"""

from __future__ import annotations

import numpy as np

POLITE = ("please {}", "{}, please", "could you {}", "your task: {}", "now {}")

PARAPHRASES: dict[str, tuple[str, ...]] = {
    "put the ring on the peg": ("place the ring over the peg", "slide the ring onto the peg", "the ring belongs on the peg"),
    "put the basketball into the hoop": ("drop the ball through the hoop", "dunk the basketball", "place the basketball in the basket"),
    "move the block from one bin to the other": ("take the block to the other bin", "transfer the block between the bins", "put the block into the second bin"),
    "put the lid on the box": ("close the box with its lid", "cover the box", "place the lid onto the box"),
    "press the button from above": ("push the button down", "press down on the button", "from above, push the button"),
    "press the button behind the wall from above": (
        "push down the button that is behind the wall",
        "go over the wall and press the button down",
        "from above, push the button behind the wall",
    ),
    "press the button": ("push the button", "push the button in", "give the button a press"),
    "reach over the wall and press the button": (
        "push the button on the other side of the wall",
        "go past the wall and push the button",
        "press the button that the wall hides",
    ),
    "press the button of the coffee machine": ("start the coffee machine", "push the coffee machine's button", "switch on the coffee machine"),
    "pull the mug away from the coffee machine": (
        "take the mug out of the coffee machine",
        "drag the cup away from the coffee machine",
        "bring the mug away from the machine",
    ),
    "push the mug under the coffee machine": (
        "move the cup under the coffee machine",
        "slide the mug below the coffee machine",
        "place the mug under the machine by pushing it",
    ),
    "turn the dial": ("rotate the dial", "twist the dial", "give the dial a turn"),
    "take the ring off the peg": ("remove the ring from the peg", "lift the ring off the peg", "pull the ring from the peg"),
    "close the door": ("shut the door", "push the door shut", "make the door closed"),
    "lock the door": ("turn the lock so that the door is locked", "bolt the door", "secure the door with its lock"),
    "open the door": ("pull the door open", "get the door open", "swing the door open"),
    "unlock the door": ("turn the lock so that the door is unlocked", "unbolt the door", "release the lock of the door"),
    "close the drawer": ("shut the drawer", "push the drawer in", "slide the drawer shut"),
    "open the drawer": ("pull the drawer open", "pull out the drawer", "slide the drawer open"),
    "close the faucet": ("turn the faucet off", "shut the tap", "turn the tap off"),
    "open the faucet": ("turn the faucet on", "open the tap", "turn the tap on"),
    "hammer the nail into the wall": ("drive the nail into the wall", "hit the nail with the hammer", "use the hammer to drive in the nail"),
    "insert the gripper into the hole": ("put the gripper into the hole", "reach into the hole with the gripper", "move the hand into the hole"),
    "press the sideways handle down": ("push down the handle at the side", "move the sideways handle downwards", "push the sideways lever down"),
    "press the handle down": ("push the handle down", "move the handle downwards", "push down on the handle"),
    "pull the sideways handle up": ("lift the handle at the side", "move the sideways handle upwards", "raise the sideways handle"),
    "pull the handle up": ("lift the handle", "raise the handle", "move the handle upwards"),
    "pull the lever up": ("raise the lever", "lift the lever", "move the lever upwards"),
    "insert the peg into the hole from the side": (
        "put the peg sideways into the hole",
        "slide the peg into the hole at the side",
        "push the peg into the side hole",
    ),
    "pull the peg out of the hole": ("unplug the peg", "remove the peg from its hole", "take the peg out sideways"),
    "pick the puck out of the hole": ("lift the puck out of the hole", "get the puck from the hole", "take the puck out of the hole"),
    "pick up the puck and place it at the goal": (
        "lift the puck and bring it to the goal",
        "carry the puck to the goal",
        "grasp the puck and put it at the target",
    ),
    "pick up the puck and place it behind the wall": (
        "lift the puck over the wall",
        "carry the puck to the other side of the wall",
        "grasp the puck and put it behind the wall",
    ),
    "slide the plate out of the cabinet sideways": (
        "pull the plate sideways from the cabinet",
        "move the plate out of the cabinet to the side",
        "get the plate out of the cabinet from the side",
    ),
    "slide the plate out of the cabinet": ("pull the plate from the cabinet", "move the plate out of the cabinet", "get the plate out of the cabinet"),
    "slide the plate into the cabinet sideways": (
        "push the plate sideways into the cabinet",
        "move the plate into the cabinet from the side",
        "put the plate in the cabinet from the side",
    ),
    "slide the plate into the cabinet": ("push the plate into the cabinet", "move the plate into the cabinet", "put the plate in the cabinet"),
    "pull the puck back to the goal": ("drag the puck back to the goal", "move the puck backwards to the goal", "bring the puck back to the target"),
    "push the puck to the goal": ("slide the puck to the goal", "move the puck to the target", "shove the puck over to the goal"),
    "push the puck around the wall to the goal": (
        "slide the puck past the wall to the goal",
        "move the puck to the target behind the wall",
        "get the puck around the wall to the goal",
    ),
    "reach the goal": ("move the gripper to the goal", "go to the target", "bring the hand to the goal"),
    "reach the goal behind the wall": (
        "move the gripper to the goal behind the wall",
        "go around the wall to the target",
        "bring the hand behind the wall to the goal",
    ),
    "place the block on the shelf": ("put the block onto the shelf", "set the block on the shelf", "lift the block to the shelf"),
    "push the ball into the net": ("score a goal", "kick the ball into the goal", "move the ball into the net"),
    "pull the bottle with the stick": ("use the stick to pull the bottle", "drag the bottle with the stick", "take the stick and pull the bottle with it"),
    "push the bottle with the stick": ("use the stick to push the bottle", "shove the bottle with the stick", "take the stick and push the bottle with it"),
    "sweep the puck into the hole": ("brush the puck into the hole", "slide the puck into the hole", "make the puck fall into the hole"),
    "sweep the puck off the table": ("brush the puck from the table", "push the puck over the table's edge", "clear the puck off the table"),
    "close the window": ("shut the window", "slide the window shut", "push the window closed"),
    "open the window": ("slide the window open", "push the window open", "get the window open"),
}


def paraphrase(instruction: str, generator: np.random.Generator) -> str:
    """The same request in other words.

    Raises:
        ValueError: an empty instruction.
    """
    if not instruction:
        raise ValueError("the environment has no instruction, so there is nothing to say in other words; leave `paraphrase` out of disturbances.kinds")
    own = PARAPHRASES.get(instruction)
    if own:
        return str(generator.choice(own))
    form, plain = str(generator.choice(POLITE)), instruction.rstrip(".")
    return form.format(plain if form.startswith("{}") else plain[0].lower() + plain[1:])
