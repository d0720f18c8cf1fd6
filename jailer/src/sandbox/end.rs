//! How a confined process ends: by one call, whatever the reason. A thread that ends by itself, an
//! abort or the C library's `exit` takes several, which every policy would have to allow to
//! whoever takes the process over.
#![expect(unsafe_code, reason = "ends the process")]

/// Exit code after a panic, as Rust's own.
const PANIC_EXIT: u8 = 101;

/// Ends the process and all its threads at once. Nothing is flushed, no destructor runs.
pub fn end(code: u8) -> ! {
    // SAFETY: _exit(2) may be called at any time; what had to be kept has been flushed by its owner.
    unsafe { libc::_exit(code.into()) }
}

/// Makes a panic in any thread end the process once its message is written: a process that lost a
/// thread must not look alive. Rust's own hook asks for the thread's number, which is one call more.
pub fn end_on_panic(process: &'static str) {
    std::panic::set_hook(Box::new(move |panic| {
        // Made whole first, so that it is one line group even where threads panic together.
        let text = format!("{process}: {panic}\n");
        let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
        end(PANIC_EXIT)
    }));
}
