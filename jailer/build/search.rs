//! A binary search ahead of a filter's rules.
//!
//! `seccompiler` compares the call with one rule after the other. When a filter is installed, the kernel runs
//! it once for each call there is, to remember those that pass whatever their arguments are: 460 times through
//! every rule. With the search nearly all of them end after a few comparisons.

use seccompiler::{BpfProgram, sock_filter};
use std::collections::BTreeSet;

/// `linux/bpf_common.h`: BPF_JMP | BPF_JA, BPF_JMP | BPF_JGE | BPF_K, BPF_RET | BPF_K.
const JUMP: u16 = 0x05;
const JUMP_GE: u16 = 0x35;
const RETURN: u16 = 0x06;
/// What `seccompiler` begins with: the architecture is checked (three instructions), the call's number loaded.
const BEFORE_RULES: usize = 4;

/// The call that `program`, compiled from one rule, lets pass.
pub(crate) fn only_call(program: &BpfProgram) -> Option<u32> {
    program.get(BEFORE_RULES).map(|first| first.k)
}

/// Puts before the rules of `program`, which name the calls `named` and no other, a search that answers every
/// other call as the program would in its end.
pub(crate) fn insert(program: &mut BpfProgram, named: &BTreeSet<u32>) -> Result<(), String> {
    let refuse = program.last().filter(|last| last.code == RETURN).cloned();
    let refuse = refuse.ok_or("a program that does not end with an answer")?;
    // Where what is named begins, and where it ends.
    let mut bounds = vec![(0, false)];
    for number in named {
        let next = number
            .checked_add(1)
            .ok_or("a call with the last of all numbers")?;
        bounds.pop_if(|(start, _)| start == number);
        if bounds.last().is_none_or(|(_, named)| !named) {
            bounds.push((*number, true));
        }
        bounds.push((next, false));
    }
    let mut search = tree(&bounds, &refuse)?;
    let end = search.len();
    for (place, instruction) in search.iter_mut().enumerate() {
        if instruction.code == JUMP {
            instruction.k = u32::try_from(end - place - 1).map_err(|e| e.to_string())?;
        }
    }
    program.splice(BEFORE_RULES..BEFORE_RULES, search);
    Ok(())
}

/// The search in `bounds`, each the first number of a range and whether it is named. Its jumps out of it
/// have yet to be told how far.
fn tree(bounds: &[(u32, bool)], refuse: &sock_filter) -> Result<BpfProgram, String> {
    let of = |code, jt, k| sock_filter { code, jt, jf: 0, k };
    match bounds {
        [] => Err("nothing to search in".into()),
        [(_, true)] => Ok(vec![of(JUMP, 0, 0)]),
        [(_, false)] => Ok(vec![refuse.clone()]),
        _ => {
            let (low, high) = bounds.split_at(bounds.len() / 2);
            let (from, high) = (high[0].0, tree(high, refuse)?);
            let low = tree(low, refuse)?;
            let skip = u8::try_from(low.len()).map_err(|_| "too many rules to search in")?;
            let mut all = vec![of(JUMP_GE, skip, from)];
            all.extend(low);
            all.extend(high);
            Ok(all)
        }
    }
}
