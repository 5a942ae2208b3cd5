"""What makes bash and zsh complete the commands, their flags and the experiments."""

import shlex
from collections.abc import Mapping, Sequence

from absl import flags

from cnn_jax.cli.flags import FLAGS, Command
from cnn_jax.common.errors import ConfigError

# zsh reads a completion of bash through its own bashcompinit.
_SCRIPT = """# Shell completion of cnn_jax. Put this line into ~/.{shell}rc:
#   source <({program} completion {shell})
{head}_cnn_jax() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} flags='' words=''
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    words={commands}
  else
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
  fi
  case $word in
    -*) COMPREPLY=($(compgen -W "$flags" -- "$word")) ;;
    *) COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word")) ;;
  esac
}}
complete -o nosort -o filenames -F _cnn_jax cnn_jax launch.sh ./launch.sh
"""


def script(
    shell: str, program: str, commands: Mapping[str, Command], experiments: Sequence[str]
) -> str:
    """The text that a shell is to read.

    Args:
      shell: "bash" or "zsh".
      program: how its user starts it.
      commands: by name.
      experiments: the names that --experiment takes.

    Raises:
      ConfigError: another shell.
    """
    if shell not in ("bash", "zsh"):
        raise ConfigError(f"{shell}: must be bash or zsh")
    cases = []
    for name, command in commands.items():
        own = " ".join(f"--{flag}{'' if _is_switch(flag) else '='}" for flag in command.flags)
        words = " ".join(experiments) if command.positional[:1] == ("experiment",) else ""
        cases.append(f"      {name}) flags={shlex.quote(own)} words={shlex.quote(words)} ;;")
    return _SCRIPT.format(
        shell=shell,
        program=program,
        head="autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "",
        commands=shlex.quote(" ".join(commands)),
        cases="\n".join(cases),
    )


def _is_switch(flag: str) -> bool:
    return FLAGS[flag].define is flags.DEFINE_bool
