// A PKCS#11 module for tests. It forwards every function of version 2.40 to a real
// module, counts the calls, and fails as a file of rules says. ../README.md has the
// rules and the variables.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define CK_PTR *
#define CK_DECLARE_FUNCTION(returnType, name) returnType name
#define CK_DECLARE_FUNCTION_POINTER(returnType, name) returnType(*name)
#define CK_CALLBACK_FUNCTION(returnType, name) returnType(*name)
#define NULL_PTR 0
#include "pkcs11.h"

// The functions by number, in the order of the standard's header.
#define CK_PKCS11_FUNCTION_INFO(name) N_##name,
enum {
#include "pkcs11f.h"
	FUNCTIONS
};
#undef CK_PKCS11_FUNCTION_INFO
#define CK_PKCS11_FUNCTION_INFO(name) #name,
static const char *const names[] = {
#include "pkcs11f.h"
};
#undef CK_PKCS11_FUNCTION_INFO

// What all processes share: ../faultp11.go reads it, and sets counts of rules to 0.
#define COUNTED 4096
#define PROCESSES 256
static struct shared {
	char names[128][32];
	uint64_t calls[128]; // by function
	uint64_t matched[COUNTED]; // by rule: calls that it looked at
	uint64_t injected[COUNTED]; // by rule: those that it failed
	struct {
		int64_t pid, sessions;
	} open[PROCESSES]; // guarded by a lock on the file
} *shared;
static int shared_fd = -1;

enum action { RV, AFTER, DELAY, HANG, ABORT, SEGV, CORRUPT };
enum when { ALWAYS, NTH, FROM, EVERY, CHANCE };

#define CODES 64
struct rule {
	int fn, id;
	enum when when;
	uint64_t n, times; // times: 0 is without end
	double chance;
	enum action action;
	unsigned long values[CODES]; // CK_RV codes, of which chance picks one, or milliseconds
	int count;
};

#define RULES 128
#define HIDDEN 32
#define SESSIONS 8192
static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER; // guards all that follows
static struct stat seen;                                // of the file of rules
static struct rule rules[RULES];
static int nrules, nhidden;
static unsigned long hidden[HIDDEN], cap, cap_total, reported, idle;
static uint64_t seed;
static struct {
	CK_SESSION_HANDLE sh;
	uint64_t used; // in ms
} sessions[SESSIONS];
static int nsessions;

static CK_FUNCTION_LIST_PTR real;
static CK_FUNCTION_LIST ours;

static void die(const char *what, const char *of) {
	fprintf(stderr, "faultp11: %s: %s\n", what, of);
	_exit(70);
}

static uint64_t now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

// parse_action reads "rv=0x30,0x31", "after=0x30", "delay=100", or a word.
static int parse_action(struct rule *r, char *word) {
	static const char *const words[] = {"rv=", "after=", "delay=", "hang", "abort", "segv", "corrupt"};
	for (int a = RV; a <= CORRUPT; a++) {
		size_t n = strlen(words[a]);
		if (strncmp(word, words[a], n) != 0)
			continue;
		r->action = a;
		for (char *v = word + n; a <= DELAY && *v && r->count < CODES; v += *v == ',')
			r->values[r->count++] = strtoul(v, &v, 0);
		return a > DELAY || r->count > 0;
	}
	return 0;
}

static int parse_when(struct rule *r, const char *word) {
	static const char *const words[] = {"always", "nth=", "from=", "every="};
	for (int w = ALWAYS; w <= EVERY; w++) {
		size_t n = strlen(words[w]);
		if (strncmp(word, words[w], n) == 0) {
			r->when = w;
			r->n = strtoull(word + n, NULL, 0);
			return w == ALWAYS || r->n > 0;
		}
	}
	if (strncmp(word, "p=", 2) == 0) {
		r->when = CHANCE;
		r->chance = strtod(word + 2, NULL);
		return 1;
	}
	if (strncmp(word, "times=", 6) == 0)
		return (r->times = strtoull(word + 6, NULL, 0)) > 0;
	if (strncmp(word, "id=", 3) == 0)
		return (r->id = atoi(word + 3)) < COUNTED && r->id >= 0;
	return 0;
}

// setting reads a line that is not of a function.
static int setting(const char *name, const char *value) {
	unsigned long n = strtoul(value, NULL, 0);
	if (strcmp(name, "sessions") == 0)
		cap = n;
	else if (strcmp(name, "sessions_total") == 0)
		cap_total = n;
	else if (strcmp(name, "reported") == 0)
		reported = n;
	else if (strcmp(name, "idle") == 0)
		idle = n;
	else if (strcmp(name, "seed") == 0)
		seed = n;
	else if (strcmp(name, "hide") == 0 && nhidden < HIDDEN)
		hidden[nhidden++] = n;
	else
		return 0;
	return 1;
}

static int parse_line(char *line, int number) {
	char *rest = NULL, *word = strtok_r(line, " \t\n", &rest);
	if (word == NULL || *word == '#')
		return 1;
	struct rule r = {.fn = -1, .id = number};
	for (int i = 0; i < FUNCTIONS; i++)
		if (strcmp(names[i], word) == 0)
			r.fn = i;
	if (r.fn < 0) {
		char *value = strtok_r(NULL, " \t\n", &rest);
		return value != NULL && setting(word, value);
	}
	int acts = 0;
	while ((word = strtok_r(NULL, " \t\n", &rest)) != NULL) {
		if (parse_action(&r, word))
			acts++;
		else if (!parse_when(&r, word))
			return 0;
	}
	if (acts != 1 || nrules == RULES)
		return 0;
	rules[nrules++] = r;
	return 1;
}

// reread reads the rules where their file is another one; mu is held.
static void reread(void) {
	const char *path = getenv("FAULTP11_RULES");
	struct stat st;
	if (path == NULL || stat(path, &st) != 0)
		memset(&st, 0, sizeof st);
	if (st.st_ino == seen.st_ino && st.st_size == seen.st_size && st.st_mtim.tv_sec == seen.st_mtim.tv_sec &&
		st.st_mtim.tv_nsec == seen.st_mtim.tv_nsec)
		return;
	seen = st;
	nrules = nhidden = 0;
	cap = cap_total = reported = idle = seed = 0;
	if (st.st_ino == 0)
		return;
	FILE *f = fopen(path, "r");
	if (f == NULL)
		die("no rules", path);
	char line[2048];
	for (int number = 0; fgets(line, sizeof line, f) != NULL; number++) {
		char copy[sizeof line];
		strcpy(copy, line);
		if (!parse_line(line, number % COUNTED))
			die("not a rule", copy);
	}
	fclose(f);
}

// dice is a number in [0, 1) that belongs to the nth call a rule looked at, in
// whatever process that was.
static double dice(const struct rule *r, uint64_t n, uint64_t salt) {
	uint64_t x = seed * 0x9E3779B97F4A7C15u + (uint64_t)r->id * 0xD1B54A32D192ED03u + n * 0x2545F4914F6CDD1Du + salt;
	x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
	x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
	return (double)((x ^ (x >> 31)) >> 11) / 9007199254740992.0;
}

static int applies(const struct rule *r, uint64_t n) {
	switch (r->when) {
	case NTH: return n == r->n;
	case FROM: return n >= r->n;
	case EVERY: return n % r->n == 0;
	case CHANCE: return dice(r, n, 1) < r->chance;
	default: return 1;
	}
}

// choose says whether a rule applies to this call, and with which value; mu is held.
static int choose(int fn, struct rule *to, unsigned long *value) {
	for (int i = 0; i < nrules; i++) {
		struct rule *r = &rules[i];
		if (r->fn != fn)
			continue;
		uint64_t n = __atomic_add_fetch(&shared->matched[r->id], 1, __ATOMIC_SEQ_CST);
		if (!applies(r, n))
			continue;
		uint64_t done = __atomic_add_fetch(&shared->injected[r->id], 1, __ATOMIC_SEQ_CST);
		if (r->times != 0 && done > r->times) {
			__atomic_sub_fetch(&shared->injected[r->id], 1, __ATOMIC_SEQ_CST);
			continue;
		}
		*to = *r;
		*value = r->count > 0 ? r->values[(int)(dice(r, n, 2) * r->count)] : 0;
		return 1;
	}
	return 0;
}

// account tells all processes how many sessions this one has; it returns how many
// all have, where want is more than 0 and the cap leaves room for it, or -1. mu is held.
static int account(int want) {
	if (flock(shared_fd, LOCK_EX) != 0)
		die("flock", strerror(errno));
	int64_t total = 0;
	int mine = -1, vacant = -1;
	for (int i = 0; i < PROCESSES; i++) {
		if (shared->open[i].pid == getpid())
			mine = i;
		else if (shared->open[i].pid != 0 && kill((pid_t)shared->open[i].pid, 0) != 0 && errno == ESRCH)
			shared->open[i].pid = shared->open[i].sessions = 0;
		if (shared->open[i].pid == 0 && vacant < 0)
			vacant = i;
		if (shared->open[i].pid != 0 && i != mine)
			total += shared->open[i].sessions;
	}
	if (mine < 0 && (mine = vacant) < 0)
		die("processes", "too many");
	int ok = want == 0 || cap_total == 0 || (uint64_t)(total + nsessions + want) <= cap_total;
	shared->open[mine].pid = getpid();
	shared->open[mine].sessions = nsessions + (ok ? want : 0);
	flock(shared_fd, LOCK_UN);
	return ok ? (int)total : -1;
}

static void forget(int i) {
	sessions[i] = sessions[--nsessions];
	account(0);
}

// touch ends what was idle for too long, and says whether sh is still there; mu is held.
static CK_RV touch(CK_SESSION_HANDLE sh) {
	uint64_t t = now();
	for (int i = nsessions - 1; idle != 0 && i >= 0; i--)
		if (t - sessions[i].used > idle) {
			real->C_CloseSession(sessions[i].sh);
			forget(i);
		}
	for (int i = 0; i < nsessions; i++)
		if (sessions[i].sh == sh) {
			sessions[i].used = t;
			return CKR_OK;
		}
	return CKR_SESSION_HANDLE_INVALID;
}

static int hides(CK_MECHANISM_TYPE m) {
	for (int i = 0; i < nhidden; i++)
		if (hidden[i] == m)
			return 1;
	return 0;
}

static void pause_ms(unsigned long ms) {
	struct timespec t = {(time_t)(ms / 1000), (long)(ms % 1000) * 1000000};
	while (nanosleep(&t, &t) != 0)
		;
}

// before counts a call and does what the rules say of it. It returns 1 where the call
// is answered with *rv; r is the rule for after, if r->action is AFTER or CORRUPT.
static int before(int fn, int has_session, CK_SESSION_HANDLE sh, CK_RV *rv, struct rule *r, unsigned long *value) {
	__atomic_add_fetch(&shared->calls[fn], 1, __ATOMIC_SEQ_CST);
	r->action = RV;
	pthread_mutex_lock(&mu);
	reread();
	int chosen = choose(fn, r, value);
	pthread_mutex_unlock(&mu);
	if (chosen)
		switch (r->action) {
		case RV: *rv = *value; return 1;
		case DELAY: pause_ms(*value); break;
		case ABORT: abort();
		case SEGV: raise(SIGSEGV); _exit(71);
		case HANG:
			for (;;)
				pause();
		default: break;
		}
	pthread_mutex_lock(&mu);
	*rv = has_session ? touch(sh) : CKR_OK;
	pthread_mutex_unlock(&mu);
	return *rv != CKR_OK;
}

#define BEGIN(name, has_session, sh) \
	struct rule r; \
	CK_RV rv = CKR_OK; \
	unsigned long value = 0; \
	if (before(N_##name, has_session, sh, &rv, &r, &value)) \
		return rv;
#define END return r.action == AFTER ? value : rv;

// Forwarders by number of arguments; S: the first one is a session.
#define F1(name, A) static CK_RV o_##name(A a) { BEGIN(name, 0, 0) rv = real->name(a); END }
#define F2(name, A, B) static CK_RV o_##name(A a, B b) { BEGIN(name, 0, 0) rv = real->name(a, b); END }
#define F3(name, A, B, C) static CK_RV o_##name(A a, B b, C c) { BEGIN(name, 0, 0) rv = real->name(a, b, c); END }
#define F4(name, A, B, C, D) static CK_RV o_##name(A a, B b, C c, D d) { BEGIN(name, 0, 0) rv = real->name(a, b, c, d); END }
#define S_ CK_SESSION_HANDLE s
#define S0(name) static CK_RV o_##name(S_) { BEGIN(name, 1, s) rv = real->name(s); END }
#define S1(name, A) static CK_RV o_##name(S_, A a) { BEGIN(name, 1, s) rv = real->name(s, a); END }
#define S2(name, A, B) static CK_RV o_##name(S_, A a, B b) { BEGIN(name, 1, s) rv = real->name(s, a, b); END }
#define S3(name, A, B, C) static CK_RV o_##name(S_, A a, B b, C c) { BEGIN(name, 1, s) rv = real->name(s, a, b, c); END }
#define S4(name, A, B, C, D) \
	static CK_RV o_##name(S_, A a, B b, C c, D d) { BEGIN(name, 1, s) rv = real->name(s, a, b, c, d); END }
#define S5(name, A, B, C, D, E) \
	static CK_RV o_##name(S_, A a, B b, C c, D d, E e) { BEGIN(name, 1, s) rv = real->name(s, a, b, c, d, e); END }
#define S7(name, A, B, C, D, E, F, G) \
	static CK_RV o_##name(S_, A a, B b, C c, D d, E e, F f, G g) { BEGIN(name, 1, s) rv = real->name(s, a, b, c, d, e, f, g); END }

typedef CK_BYTE_PTR BP;
typedef CK_ULONG_PTR UP;
typedef CK_ULONG U;
typedef CK_OBJECT_HANDLE OH;
typedef CK_MECHANISM_PTR MP;
typedef CK_ATTRIBUTE_PTR AP;

F1(C_Initialize, CK_VOID_PTR)
F1(C_GetInfo, CK_INFO_PTR)
F3(C_GetSlotList, CK_BBOOL, CK_SLOT_ID_PTR, UP)
F2(C_GetSlotInfo, CK_SLOT_ID, CK_SLOT_INFO_PTR)
F4(C_InitToken, CK_SLOT_ID, CK_UTF8CHAR_PTR, U, CK_UTF8CHAR_PTR)
F3(C_WaitForSlotEvent, CK_FLAGS, CK_SLOT_ID_PTR, CK_VOID_PTR)
S2(C_InitPIN, CK_UTF8CHAR_PTR, U)
S4(C_SetPIN, CK_UTF8CHAR_PTR, U, CK_UTF8CHAR_PTR, U)
S1(C_GetSessionInfo, CK_SESSION_INFO_PTR)
S2(C_GetOperationState, BP, UP)
S4(C_SetOperationState, BP, U, OH, OH)
S3(C_Login, CK_USER_TYPE, CK_UTF8CHAR_PTR, U)
S0(C_Logout)
S3(C_CreateObject, AP, U, CK_OBJECT_HANDLE_PTR)
S4(C_CopyObject, OH, AP, U, CK_OBJECT_HANDLE_PTR)
S1(C_DestroyObject, OH)
S2(C_GetObjectSize, OH, UP)
S3(C_GetAttributeValue, OH, AP, U)
S3(C_SetAttributeValue, OH, AP, U)
S2(C_FindObjectsInit, AP, U)
S3(C_FindObjects, CK_OBJECT_HANDLE_PTR, U, UP)
S0(C_FindObjectsFinal)
S2(C_EncryptInit, MP, OH)
S4(C_Encrypt, BP, U, BP, UP)
S4(C_EncryptUpdate, BP, U, BP, UP)
S2(C_EncryptFinal, BP, UP)
S2(C_DecryptInit, MP, OH)
S4(C_Decrypt, BP, U, BP, UP)
S4(C_DecryptUpdate, BP, U, BP, UP)
S2(C_DecryptFinal, BP, UP)
S1(C_DigestInit, MP)
S4(C_Digest, BP, U, BP, UP)
S2(C_DigestUpdate, BP, U)
S1(C_DigestKey, OH)
S2(C_DigestFinal, BP, UP)
S2(C_SignUpdate, BP, U)
S2(C_SignFinal, BP, UP)
S2(C_SignRecoverInit, MP, OH)
S4(C_SignRecover, BP, U, BP, UP)
S2(C_VerifyInit, MP, OH)
S4(C_Verify, BP, U, BP, U)
S2(C_VerifyUpdate, BP, U)
S2(C_VerifyFinal, BP, U)
S2(C_VerifyRecoverInit, MP, OH)
S4(C_VerifyRecover, BP, U, BP, UP)
S4(C_DigestEncryptUpdate, BP, U, BP, UP)
S4(C_DecryptDigestUpdate, BP, U, BP, UP)
S4(C_SignEncryptUpdate, BP, U, BP, UP)
S4(C_DecryptVerifyUpdate, BP, U, BP, UP)
S4(C_GenerateKey, MP, AP, U, CK_OBJECT_HANDLE_PTR)
S7(C_GenerateKeyPair, MP, AP, U, AP, U, CK_OBJECT_HANDLE_PTR, CK_OBJECT_HANDLE_PTR)
S5(C_WrapKey, MP, OH, OH, BP, UP)
S7(C_UnwrapKey, MP, OH, BP, U, AP, U, CK_OBJECT_HANDLE_PTR)
S5(C_DeriveKey, MP, OH, AP, U, CK_OBJECT_HANDLE_PTR)
S2(C_SeedRandom, BP, U)
S2(C_GenerateRandom, BP, U)
S0(C_GetFunctionStatus)
S0(C_CancelFunction)

// Those that know more than to forward.

static CK_RV o_C_Finalize(CK_VOID_PTR p) {
	BEGIN(C_Finalize, 0, 0)
	rv = real->C_Finalize(p);
	pthread_mutex_lock(&mu);
	nsessions = 0;
	account(0);
	pthread_mutex_unlock(&mu);
	END
}

static CK_RV o_C_GetTokenInfo(CK_SLOT_ID slot, CK_TOKEN_INFO_PTR info) {
	BEGIN(C_GetTokenInfo, 0, 0)
	rv = real->C_GetTokenInfo(slot, info);
	pthread_mutex_lock(&mu);
	if (rv == CKR_OK && reported != 0)
		info->ulMaxSessionCount = reported;
	pthread_mutex_unlock(&mu);
	END
}

static CK_RV o_C_GetMechanismList(CK_SLOT_ID slot, CK_MECHANISM_TYPE_PTR list, UP n) {
	BEGIN(C_GetMechanismList, 0, 0)
	rv = real->C_GetMechanismList(slot, list, n);
	pthread_mutex_lock(&mu);
	CK_ULONG kept = 0;
	for (CK_ULONG i = 0; rv == CKR_OK && list != NULL && i < *n; i++)
		if (!hides(list[i]))
			list[kept++] = list[i];
	if (rv == CKR_OK && list != NULL)
		*n = kept;
	pthread_mutex_unlock(&mu);
	END
}

static CK_RV o_C_GetMechanismInfo(CK_SLOT_ID slot, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO_PTR info) {
	BEGIN(C_GetMechanismInfo, 0, 0)
	pthread_mutex_lock(&mu);
	int hide = hides(type);
	pthread_mutex_unlock(&mu);
	rv = hide ? CKR_MECHANISM_INVALID : real->C_GetMechanismInfo(slot, type, info);
	END
}

static CK_RV o_C_SignInit(CK_SESSION_HANDLE s, MP m, OH key) {
	BEGIN(C_SignInit, 1, s)
	pthread_mutex_lock(&mu);
	int hide = hides(m->mechanism);
	pthread_mutex_unlock(&mu);
	rv = hide ? CKR_MECHANISM_INVALID : real->C_SignInit(s, m, key);
	END
}

static CK_RV o_C_Sign(CK_SESSION_HANDLE s, BP data, U n, BP sig, UP m) {
	BEGIN(C_Sign, 1, s)
	rv = real->C_Sign(s, data, n, sig, m);
	if (rv == CKR_OK && r.action == CORRUPT && sig != NULL)
		sig[*m / 2] ^= 1;
	END
}

static CK_RV o_C_OpenSession(CK_SLOT_ID slot, CK_FLAGS flags, CK_VOID_PTR app, CK_NOTIFY notify, CK_SESSION_HANDLE_PTR sh) {
	BEGIN(C_OpenSession, 0, 0)
	pthread_mutex_lock(&mu);
	touch(0);
	if (nsessions == SESSIONS || (cap != 0 && (unsigned long)nsessions >= cap) || account(1) < 0)
		rv = CKR_SESSION_COUNT;
	else
		rv = real->C_OpenSession(slot, flags, app, notify, sh);
	if (rv == CKR_OK) {
		sessions[nsessions].sh = *sh;
		sessions[nsessions++].used = now();
	}
	account(0);
	pthread_mutex_unlock(&mu);
	END
}

static CK_RV o_C_CloseSession(CK_SESSION_HANDLE s) {
	BEGIN(C_CloseSession, 1, s)
	pthread_mutex_lock(&mu);
	rv = real->C_CloseSession(s);
	for (int i = nsessions - 1; i >= 0; i--)
		if (sessions[i].sh == s)
			forget(i);
	pthread_mutex_unlock(&mu);
	END
}

static CK_RV o_C_CloseAllSessions(CK_SLOT_ID slot) {
	BEGIN(C_CloseAllSessions, 0, 0)
	pthread_mutex_lock(&mu);
	rv = real->C_CloseAllSessions(slot);
	nsessions = 0; // of one token: the tests have no more in a process
	account(0);
	pthread_mutex_unlock(&mu);
	END
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list);
static CK_RV o_C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list) { return C_GetFunctionList(list); }

static void load(void) {
	const char *counts = getenv("FAULTP11_COUNTS"), *path = getenv("FAULTP11_MODULE");
	if (counts == NULL || path == NULL)
		die("not set", "FAULTP11_MODULE or FAULTP11_COUNTS");
	shared_fd = open(counts, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (shared_fd < 0 || ftruncate(shared_fd, sizeof *shared) != 0)
		die(counts, strerror(errno));
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
	if (shared == MAP_FAILED)
		die(counts, strerror(errno));
	for (int i = 0; i < FUNCTIONS; i++)
		strncpy(shared->names[i], names[i], sizeof shared->names[i] - 1);
	void *so = dlopen(path, RTLD_NOW);
	CK_C_GetFunctionList get = so ? (CK_C_GetFunctionList)dlsym(so, "C_GetFunctionList") : NULL;
	if (get == NULL || get(&real) != CKR_OK)
		die("not a PKCS#11 module", path);
	ours.version = real->version;
#define CK_PKCS11_FUNCTION_INFO(name) ours.name = o_##name;
#include "pkcs11f.h"
#undef CK_PKCS11_FUNCTION_INFO
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list) {
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	pthread_once(&once, load);
	*list = &ours;
	return CKR_OK;
}
