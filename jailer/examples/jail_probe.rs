//! What `tests/sandbox.rs` executes in a jail: it tells what it sees on descriptor 1, and then
//! does what its argument says.

use jailer::sandbox::{OrEnd, Role, SeccompMode, end, end_on_panic, lockdown};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::fs::File;
use std::io::{IoSlice, Read};

/// As every confined process has: the policies know its three calls only.
#[global_allocator]
static ALLOCATOR: OrEnd<dlmalloc::GlobalDlmalloc> = OrEnd::new(dlmalloc::GlobalDlmalloc);

fn main() {
    let order = std::env::args().nth(1).unwrap_or_default();
    // The filter of a start forbids to look around.
    if order == "look" {
        look();
    }
    if order == "early" {
        // Not in startup.policy.
        let _ = nix::unistd::getppid();
        println!("survived");
    }
    let mode = match order.as_str() {
        "trapped" => SeccompMode::Trap,
        _ => SeccompMode::Enforce,
    };
    end_on_panic("probe");
    let role = match order.as_str() {
        // Whose policy has least for the end of a process.
        "hungry" | "park" => Role::Disk,
        _ => Role::Supervisor,
    };
    let _locked = lockdown(role, mode).expect("lockdown");
    println!("locked");
    match order.as_str() {
        "forbidden" | "trapped" => {
            // Not in supervisor.policy.
            let _ = nix::unistd::getppid();
            println!("survived");
        }
        "panic" => panic!("as ordered"),
        "park" => println!("{}", park()),
        // More than any bound of an address space.
        "hungry" => println!("{}", vec![1_u8; 1 << 46].len()),
        _ => {}
    }
    // Until the test has looked.
    let _ = std::io::stdin().read(&mut [0]);
    end(0);
}

/// Sends descriptors that nobody takes, until it is refused: why.
fn park() -> Errno {
    const MOST_IN_A_MESSAGE: usize = 253;
    let rights = [ControlMessage::ScmRights(&[1; MOST_IN_A_MESSAGE])];
    loop {
        let parts = [IoSlice::new(b"x")];
        if let Err(errno) = sendmsg::<()>(0, &parts, &rights, MsgFlags::MSG_DONTWAIT, None) {
            return errno;
        }
    }
}

fn look() {
    let entries = std::fs::read_dir("/").map_or(-1, |all| all.count() as i64);
    println!("root-entries={entries}");
    println!("environment={}", std::env::vars().count());
    println!("pid={}", std::process::id());
    let writable = File::create("/x").is_ok();
    println!("writable={writable}");
    let open: Vec<String> = (0..1024)
        .filter(|fd| nix::fcntl::fcntl(borrow(*fd), nix::fcntl::FcntlArg::F_GETFD).is_ok())
        .map(|fd| fd.to_string())
        .collect();
    println!("fds={}", open.join(","));
}

#[expect(unsafe_code, reason = "asks of every number whether it is open")]
fn borrow(fd: i32) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: the number is used in one fcntl, which answers EBADF where it is not open.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}
