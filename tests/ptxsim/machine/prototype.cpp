// ptxsim: a functional, warp-vectorised PTX interpreter for CPU (sm_80 subset + wgmma), with
//  * happens-before race detection on shared memory (vector clocks per warp; in-flight cp.async tracking)
//  * out-of-bounds checks on global ranges, poisoned shared memory, uninitialised-shared-read counter
//  * dynamic instruction counts, bank-conflict wavefronts and global sectors
// Written from the PTX ISA document; no third-party code.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <cctype>
#include <string>
#include <vector>
#include <map>
#include <set>
#include <unordered_map>
#include <algorithm>
#include <stdexcept>
#include <memory>
#include <array>
using namespace std;
typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64; typedef int64_t i64; typedef int32_t i32;
static const u64 SH_BASE = 0x1000000000000000ull, PARAM_BASE = 0x2000000000000000ull, LOCAL_BASE = 0x3000000000000000ull;
struct Err : runtime_error { using runtime_error::runtime_error; };
static inline float u2f(u64 x){u32 y=(u32)x;float f;memcpy(&f,&y,4);return f;}
static inline u64 f2u(float f){u32 y;memcpy(&y,&f,4);return y;}
static inline double u2d(u64 x){double f;memcpy(&f,&x,8);return f;}
static inline u64 d2u(double f){u64 y;memcpy(&y,&f,8);return y;}
static inline float h2f(u16 h){_Float16 x;memcpy(&x,&h,2);return (float)x;}
static inline u16 f2h(float f){_Float16 x=(_Float16)f;u16 h;memcpy(&h,&x,2);return h;}
static inline float b2f(u16 h){return u2f((u64)h<<16);}
static inline u16 f2b(float f){u32 u=(u32)f2u(f);if((u&0x7fffffff)>0x7f800000)return 0x7fff;return (u+0x7fff+((u>>16)&1))>>16;}
static inline float ftzf(float f){u32 u=(u32)f2u(f);return (u&0x7f800000)?f:u2f(u&0x80000000);}
enum Ty:u8{T_NONE,T_P,B8,B16,B32,B64,B128,U8,U16,U32,U64,S8,S16,S32,S64,F16,BF16,F32,F64,F16X2,BF16X2,TF32};
static map<string,Ty> TY={{"pred",T_P},{"b8",B8},{"b16",B16},{"b32",B32},{"b64",B64},{"b128",B128},{"u8",U8},{"u16",U16},{"u32",U32},{"u64",U64},
 {"s8",S8},{"s16",S16},{"s32",S32},{"s64",S64},{"f16",F16},{"bf16",BF16},{"f32",F32},{"f64",F64},{"f16x2",F16X2},{"bf16x2",BF16X2},{"tf32",TF32}};
static int tsz(Ty t){switch(t){case B8:case U8:case S8:case T_P:return 1;case B16:case U16:case S16:case F16:case BF16:return 2;case B64:case U64:case S64:case F64:return 8;case B128:return 16;default:return 4;}}
static bool isS(Ty t){return t>=S8&&t<=S64;} static bool isF(Ty t){return t==F16||t==BF16||t==F32||t==F64;}
static inline u64 maskw(u64 v,int sz){return sz==8?v:v&((1ull<<(8*sz))-1);}
static inline i64 sext(u64 v,int sz){int s=64-8*sz;return (i64)(v<<s)>>s;}
static float getf(u64 v,Ty t){switch(t){case F16:return h2f(v);case BF16:return b2f(v);default:return u2f(v);}}
static u64 putf(float f,Ty t){switch(t){case F16:return f2h(f);case BF16:return f2b(f);default:return f2u(f);}}
enum Op:u8{O_NOP,O_LD,O_ST,O_MOV,O_ADD,O_SUB,O_MUL,O_MAD,O_FMA,O_DIV,O_REM,O_MIN,O_MAX,O_ABS,O_NEG,O_AND,O_OR,O_XOR,O_NOT,O_SHL,O_SHR,O_SETP,O_SET,O_SELP,O_CVT,O_CVTA,
 O_BRA,O_RET,O_BAR,O_BARARRIVE,O_WARPSYNC,O_SHFL,O_VOTE,O_ACTIVEMASK,O_EX2,O_LG2,O_RCP,O_SQRT,O_RSQRT,O_SIN,O_COS,O_TANH,O_PRMT,O_BFE,O_BFI,O_POPC,O_CLZ,O_BREV,O_SHF,O_LOP3,O_FNS,
 O_CPASYNC,O_CPCOMMIT,O_CPWAIT,O_CPWAITALL,O_LDMATRIX,O_STMATRIX,O_MMA,O_WGMMA,O_ATOM,O_RED,O_TRAP,O_COPYSIGN,O_ELECT,O_MBAR_INIT,O_MBAR_ARRIVE,O_MBAR_TRY,O_MBAR_INVAL,O_BULK,O_MUL24,O_SAD,O_REDUX,O_ISSPACEP,O_MATCH,O_WGCOMMIT,O_WGWAIT,O_PROXYFENCE,O_COUNT};
struct Opnd{u8 k=0;/*0 none 1 reg 2 vec 3 mem*/ int r=-1; i64 off=0; vector<int> v; bool neg=false; int r2=-1;};
struct Inst{Op op=O_NOP;Ty t=T_NONE,t2=T_NONE;u8 vec=1,space=0;/*0 generic 1 global 2 shared 3 param 4 local 5 const*/bool ftz=false,sat=false,wide=false,hi=false,trans=false,uni=false,relu=false,cc=false;
 u8 cmp=0,bop=0,rnd=0,sub=0;int mm=0,mn=0,mk=0;Ty mt[4]={T_NONE,T_NONE,T_NONE,T_NONE};int pred=-1;bool pneg=false;int target=-1;int line=0;int stat=0;vector<Opnd> o;string text;vector<string> m;};
struct Param{string name;int size,off,align;};
struct Kernel{string name;vector<Inst> code;vector<Param> params;int psize=0;int nreg=0;map<string,int> labels;vector<pair<int,u64>> consts;map<u64,int> constIdx;
 map<string,pair<int,u64>> syms;/*space,addr*/int shStatic=0,locSize=0;int reqntid=0;vector<vector<u8>> globals;vector<string> statNames;map<string,int> statIdx;map<int,int> sregs;};
enum SR{SR_TIDX,SR_TIDY,SR_TIDZ,SR_NTIDX,SR_NTIDY,SR_NTIDZ,SR_CTAX,SR_CTAY,SR_CTAZ,SR_NCTAX,SR_NCTAY,SR_NCTAZ,SR_LANE,SR_WARP,SR_LMEQ,SR_LMLT,SR_LMLE,SR_LMGT,SR_LMGE,SR_SMID,SR_CLOCK,SR_NWARP,SR_ZERO,SR_TOTSM,SR_ONE,SR_DYNSM};
static map<string,int> SRN={{"tid.x",SR_TIDX},{"tid.y",SR_TIDY},{"tid.z",SR_TIDZ},{"ntid.x",SR_NTIDX},{"ntid.y",SR_NTIDY},{"ntid.z",SR_NTIDZ},{"ctaid.x",SR_CTAX},{"ctaid.y",SR_CTAY},{"ctaid.z",SR_CTAZ},
 {"nctaid.x",SR_NCTAX},{"nctaid.y",SR_NCTAY},{"nctaid.z",SR_NCTAZ},{"laneid",SR_LANE},{"warpid",SR_WARP},{"lanemask_eq",SR_LMEQ},{"lanemask_lt",SR_LMLT},{"lanemask_le",SR_LMLE},{"lanemask_gt",SR_LMGT},{"lanemask_ge",SR_LMGE},
 {"smid",SR_SMID},{"clock",SR_CLOCK},{"clock64",SR_CLOCK},{"globaltimer",SR_CLOCK},{"nwarpid",SR_NWARP},{"cluster_ctarank",SR_ZERO},{"cluster_ctaid.x",SR_ZERO},{"total_smem_size",SR_TOTSM},{"dynamic_smem_size",SR_DYNSM},{"cluster_nctarank",SR_ONE}};
// ------------------------------------------------------------------ parser
struct Parser{
 string s;size_t p=0;int line=1;Kernel*K;u64 dynBase=0;vector<map<string,int>> scopes;set<int> predRegs;vector<tuple<int,int,string>> fix;
 [[noreturn]] void err(const string&m){throw Err("parse line "+to_string(line)+": "+m);}
 void ws(){while(p<s.size()){if(s[p]=='\n'){line++;p++;}else if(isspace(s[p]))p++;else if(s.compare(p,2,"//")==0){while(p<s.size()&&s[p]!='\n')p++;}
  else if(s.compare(p,2,"/*")==0){size_t e=s.find("*/",p);for(;p<e+2;p++)if(s[p]=='\n')line++;}else break;}}
 static bool idc(char c){return isalnum(c)||c=='_'||c=='$'||c=='%'||c=='.'||c==':';}
 string ident(){ws();size_t b=p;while(p<s.size()&&(isalnum(s[p])||s[p]=='_'||s[p]=='$'||s[p]=='%'||s[p]=='.'))p++;return s.substr(b,p-b);}
 bool eat(char c){ws();if(p<s.size()&&s[p]==c){p++;return true;}return false;}
 void need(char c){if(!eat(c))err(string("expected ")+c+" near '"+s.substr(p,40)+"'");}
 int newreg(){return K->nreg++;}
 int lookup(const string&n){for(int i=(int)scopes.size()-1;i>=0;i--){auto f=scopes[i].find(n);if(f!=scopes[i].end())return f->second;}return -1;}
 int constant(u64 v){auto f=K->constIdx.find(v);if(f!=K->constIdx.end())return f->second;int r=newreg();K->constIdx[v]=r;K->consts.push_back({r,v});return r;}
 u64 number(Ty t){ws();bool neg=false;if(s[p]=='-'){neg=true;p++;}else if(s[p]=='+')p++;
  if(s[p]=='0'&&(s[p+1]=='f'||s[p+1]=='F')&&isxdigit(s[p+2])){u64 v=strtoull(s.substr(p+2,8).c_str(),0,16);p+=10;if(neg)v^=0x80000000;if(t==F64)v=d2u(u2f(v));if(t==F16)v=f2h(u2f(v));if(t==BF16)v=f2b(u2f(v));return v;}
  if(s[p]=='0'&&(s[p+1]=='d'||s[p+1]=='D')&&isxdigit(s[p+2])){u64 v=strtoull(s.substr(p+2,16).c_str(),0,16);p+=18;return v;}
  size_t b=p;bool fl=false;if(s[p]=='0'&&(s[p+1]=='x'||s[p+1]=='X')){p+=2;while(isxdigit(s[p]))p++;}
  else while(isdigit(s[p])||s[p]=='.'||((s[p]=='e'||s[p]=='E')&&(isdigit(s[p+1])||s[p+1]=='-'||s[p+1]=='+'))){if(s[p]=='.')fl=true;if(s[p]=='e'||s[p]=='E'){fl=true;p++;}p++;}
  string tok=s.substr(b,p-b);if(s[p]=='U'||s[p]=='u')p++;if(fl){double d=strtod(tok.c_str(),0);if(neg)d=-d;if(t==F64)return d2u(d);if(t==F16)return f2h(d);if(t==BF16)return f2b(d);return f2u((float)d);}
  u64 v=strtoull(tok.c_str(),0,0);return neg?(u64)-(i64)v:v;}
 int symreg(const string&n,i64 off){auto f=K->syms.find(n);if(f==K->syms.end())err("unknown symbol "+n);return constant(f->second.second+off);}
 int sreg(const string&n){auto f=SRN.find(n);if(f==SRN.end())err("unknown special register %"+n);auto g=K->sregs.find(f->second);if(g!=K->sregs.end())return g->second;int r=newreg();K->sregs[f->second]=r;return r;}
 int scalar(Ty t){ws();char c=s[p];if(isdigit(c)||c=='-'||c=='+')return constant(number(t));
  if(c=='_'&&!(isalnum(s[p+1])||s[p+1]=='_'||s[p+1]=='$')){p++;return newreg();}
  string n=ident();int r=lookup(n);if(r>=0)return r;
  if(n[0]=='%')return sreg(n.substr(1));
  i64 off=0;if(eat('+'))off=(i64)number(B64);return symreg(n,off);}
 Opnd operand(Ty t){Opnd o;ws();if(eat('!')){o.neg=true;}
  if(eat('{')){o.k=2;if(!eat('}')){do o.v.push_back(scalar(t));while(eat(','));need('}');}return o;}
  if(eat('[')){o.k=3;ws();if(isdigit(s[p])){o.r=constant(number(B64));}else{string n=ident();int r=lookup(n);if(r>=0){o.r=r;}else if(n[0]=='%')err("reg? "+n);else o.r=symreg(n,0);}
   while(true){ws();if(s[p]=='+'){p++;ws();o.off+=(i64)number(B64);}else if(s[p]=='-'){o.off+=(i64)number(B64);}else break;}
   need(']');return o;}
  o.k=1;o.r=scalar(t);if(eat('|')){o.r2=scalar(T_P);}return o;}
 void regdecl(){ws();string ty=ident();auto mk=[&](const string&n){int r=newreg();scopes.back()[n]=r;if(ty==".pred")predRegs.insert(r);};do{ws();string n=ident();if(eat('<')){u64 c=number(B32);need('>');for(u64 i=0;i<c;i++)mk(n+to_string(i));}else mk(n);}while(eat(','));need(';');}
 void vardecl(const string&space){Ty t=B8;int align=1;u64 count=1;string n;bool arr=false,ext=false;vector<u64> init;bool hasInit=false;
  while(true){ws();string id=ident();if(id==".align"){align=(int)number(B32);continue;}if(id[0]=='.'){auto f=TY.find(id.substr(1));if(f!=TY.end())t=f->second;continue;}n=id;break;}
  while(eat('[')){arr=true;if(eat(']')){ext=true;count=0;}else{count*=number(B32);need(']');}}
  if(eat('=')){hasInit=true;if(eat('{')){do init.push_back(number(t));while(eat(','));need('}');}else init.push_back(number(t));}
  need(';');(void)arr;align=max(align,tsz(t));int bytes=(int)count*tsz(t);
  if(space==".shared"){K->shStatic=(K->shStatic+align-1)/align*align;if(ext)K->syms[n]={2,scopes.size()>1?dynBase:~0ull};else{K->syms[n]={2,(u64)K->shStatic};K->shStatic+=bytes;}}
  else if(space==".local"){K->locSize=(K->locSize+align-1)/align*align;K->syms[n]={4,LOCAL_BASE+K->locSize};K->locSize+=bytes;}
  else{vector<u8> g(max(bytes,16));if(hasInit)for(size_t i=0;i<init.size();i++)memcpy(&g[i*tsz(t)],&init[i],tsz(t));K->globals.push_back(std::move(g));K->syms[n]={1,(u64)K->globals.back().data()};}}
 void skipto(char c){while(p<s.size()&&s[p]!=c){if(s[p]=='\n')line++;p++;}p++;}
 bool parseModule(Kernel&k,const string&want){K=&k;scopes.push_back({});bool found=false;
  while(true){ws();if(p>=s.size())break;size_t b=p;string id=ident();if(id.empty())err("unexpected '"+s.substr(p,30)+"'");
   if(id==".version"||id==".target"||id==".address_size"||id==".file"){while(p<s.size()&&s[p]!='\n')p++;continue;}
   if(id==".visible"||id==".extern"||id==".weak"||id==".common")continue;
   if(id==".section"){int d=0;skipto('{');d=1;while(d&&p<s.size()){if(s[p]=='{')d++;if(s[p]=='}')d--;if(s[p]=='\n')line++;p++;}continue;}
   if(id==".shared"||id==".global"||id==".const"){vardecl(id);continue;}
   if(id==".func"){size_t br=s.find('{',p),sc=s.find(';',p);if(sc<br){skipto(';');}else{skipto('{');int d=1;while(d){if(s[p]=='{')d++;if(s[p]=='}')d--;if(s[p]=='\n')line++;p++;}}continue;}
   if(id==".entry"){string n=ident();bool use=!found&&(want.empty()||n==want);if(!use){skipto('{');int d=1;while(d){if(s[p]=='{')d++;if(s[p]=='}')d--;if(s[p]=='\n')line++;p++;}continue;}
    found=true;k.name=n;if(eat('(')){if(!eat(')')){do{Param q;q.align=1;Ty t=B8;u64 cnt=1;while(true){ws();string w=ident();if(w==".param"||w==".ptr"||w==".global"||w==".shared")continue;if(w==".align"){int a=(int)number(B32);if(a>q.align)q.align=a;continue;}
       if(w[0]=='.'){auto f=TY.find(w.substr(1));if(f!=TY.end())t=f->second;continue;}q.name=w;break;}
       if(eat('[')){cnt=number(B32);need(']');}q.size=(int)cnt*tsz(t);int al=max(tsz(t),cnt>1?q.align:tsz(t));q.off=(k.psize+al-1)/al*al;k.psize=q.off+q.size;k.params.push_back(q);k.syms[q.name]={3,PARAM_BASE+q.off};}while(eat(','));need(')');}}
    while(true){ws();if(s[p]=='{')break;string d=ident();if(d==".reqntid"||d==".maxntid"){k.reqntid=(int)number(B32);while(eat(','))k.reqntid*=(int)number(B32);}else if(d==".minnctapersm"||d==".maxnreg"||d==".blocksareclusters"||d==".explicitcluster"){ws();if(isdigit(s[p]))number(B32);}else if(d==".pragma"||d==".reqnctapercluster"){skipto(d==".pragma"?';':'\n');}else err("directive "+d);}
    // dynamic (extern) shared goes after the statics; dynBase comes from a first parse
    for(auto&kv:k.syms)if(kv.second.first==2&&kv.second.second==~0ull)kv.second.second=dynBase;
    body();continue;}
   (void)b;err("module directive "+id);}
  for(auto&f:fix){auto it=k.labels.find(get<2>(f));if(it==k.labels.end())throw Err("label "+get<2>(f));k.code[get<0>(f)].target=it->second;}
  return found;}
 void body(){need('{');scopes.push_back({});int depth=1;
  while(depth){ws();if(eat('{')){scopes.push_back({});depth++;continue;}if(eat('}')){scopes.pop_back();depth--;continue;}if(eat(';'))continue;
   int ln=line;size_t b=p;int pr=-1;bool pn=false;
   if(eat('@')){pn=eat('!');string n=ident();pr=lookup(n);if(pr<0)err("pred "+n);ws();b=p;}
   size_t b0=p;while(p<s.size()&&(isalnum(s[p])||s[p]=='_'||s[p]=='$'||s[p]=='%'||s[p]=='.'||(s[p]==':'&&s[p+1]==':')))p+=(s[p]==':')?2:1;
   string id=s.substr(b0,p-b0);
   if(pr<0&&id[0]!='.'&&eat(':')){K->labels[id]=(int)K->code.size();continue;}
   if(id==".reg"){regdecl();continue;}if(id==".shared"||id==".local"||id==".global"||id==".const"){vardecl(id);continue;}
   if(id==".loc"){while(s[p]!='\n')p++;continue;}if(id==".pragma"){skipto(';');continue;}if(id==".param"){skipto(';');continue;}
   Inst in=inst(id,ln);in.pred=pr;in.pneg=pn;in.text=s.substr(b,p-b);for(auto&c:in.text)if(c=='\n'||c=='\t')c=' ';K->code.push_back(in);}
 }
 Inst inst(const string&full,int ln){Inst I;I.line=ln;vector<string> m;{size_t a=0;while(true){size_t e=full.find('.',a);m.push_back(full.substr(a,e==string::npos?e:e-a));if(e==string::npos)break;a=e+1;}}
  auto has=[&](const char*x){return find(m.begin(),m.end(),x)!=m.end();};const string&b=m[0];
  {auto f=K->statIdx.find(full);if(f==K->statIdx.end()){I.stat=(int)K->statNames.size();K->statIdx[full]=I.stat;K->statNames.push_back(full);}else I.stat=f->second;}
  vector<Ty> ts;for(size_t i=1;i<m.size();i++){auto f=TY.find(m[i]);if(f!=TY.end())ts.push_back(f->second);}
  for(size_t i=0;i<ts.size()&&i<4;i++)I.mt[i]=ts[i];if(ts.size())I.t=ts.back();if(ts.size()>1)I.t2=ts[0];else I.t2=I.t;
  I.ftz=has("ftz");I.sat=has("sat");I.wide=has("wide");I.hi=has("hi");I.trans=has("trans");I.relu=has("relu");
  for(size_t i=1;i<m.size();i++){const string&x=m[i];if(x=="v2")I.vec=2;else if(x=="v4")I.vec=4;else if(x=="v8")I.vec=8;else if(x=="global")I.space=1;else if(x=="shared"||x.rfind("shared::",0)==0){if(!I.space)I.space=2;}else if(x=="param"||x.rfind("param::",0)==0)I.space=3;else if(x=="local")I.space=4;else if(x=="const")I.space=1;}
  if(has("rz")||has("rm")||has("rp"))I.rnd=1;else if(has("rzi"))I.rnd=2;else if(has("rni"))I.rnd=3;else if(has("rmi"))I.rnd=4;else if(has("rpi"))I.rnd=5;
  static map<string,Op> M={{"ld",O_LD},{"ldu",O_LD},{"st",O_ST},{"mov",O_MOV},{"add",O_ADD},{"sub",O_SUB},{"mul",O_MUL},{"mad",O_MAD},{"fma",O_FMA},{"div",O_DIV},{"rem",O_REM},{"min",O_MIN},{"max",O_MAX},{"abs",O_ABS},{"neg",O_NEG},
   {"and",O_AND},{"or",O_OR},{"xor",O_XOR},{"not",O_NOT},{"shl",O_SHL},{"shr",O_SHR},{"setp",O_SETP},{"set",O_SET},{"selp",O_SELP},{"cvt",O_CVT},{"cvta",O_CVTA},{"bra",O_BRA},{"ret",O_RET},{"exit",O_RET},{"shfl",O_SHFL},{"vote",O_VOTE},{"activemask",O_ACTIVEMASK},
   {"ex2",O_EX2},{"lg2",O_LG2},{"rcp",O_RCP},{"sqrt",O_SQRT},{"rsqrt",O_RSQRT},{"sin",O_SIN},{"cos",O_COS},{"tanh",O_TANH},{"prmt",O_PRMT},{"bfe",O_BFE},{"bfi",O_BFI},{"popc",O_POPC},{"clz",O_CLZ},{"brev",O_BREV},{"shf",O_SHF},{"lop3",O_LOP3},
   {"ldmatrix",O_LDMATRIX},{"stmatrix",O_STMATRIX},{"mma",O_MMA},{"atom",O_ATOM},{"red",O_RED},{"trap",O_TRAP},{"copysign",O_COPYSIGN},{"elect",O_ELECT},{"redux",O_REDUX}};
  if(b=="bar"||b=="barrier"){if(m.size()>1&&m[1]=="warp")I.op=O_WARPSYNC;else if(has("arrive"))I.op=O_BARARRIVE;else if(has("sync"))I.op=O_BAR;else err("unsupported "+full);}
  else if(b=="cp"&&m[1]=="async"){if(has("bulk"))err("unsupported "+full);if(has("commit_group"))I.op=O_CPCOMMIT;else if(has("wait_group"))I.op=O_CPWAIT;else if(has("wait_all"))I.op=O_CPWAITALL;else if(has("mbarrier"))err("unsupported "+full);else I.op=O_CPASYNC;}
  else if(b=="wgmma"){if(m[1]=="mma_async"){I.op=O_WGMMA;}else I.op=O_WARPSYNC;if(m[1]=="commit_group")I.op=O_WGCOMMIT;else if(m[1]=="wait_group")I.op=O_WGWAIT;else if(m[1]=="fence")I.op=O_NOP;}
  else if(b=="fence"&&has("proxy")&&m.size()>2&&m[2]=="async"){I.op=O_PROXYFENCE;}
  else if(b=="fence"||b=="membar"||b=="nanosleep"||b=="griddepcontrol"||b=="prefetch"||b=="setmaxnreg"||b=="discard"||b=="applypriority"||b=="createpolicy"||b=="brkpt"){I.op=O_NOP;}
  else if(b=="mbarrier"){if(m[1]=="init")I.op=O_MBAR_INIT;else if(m[1]=="arrive")I.op=O_MBAR_ARRIVE;else if(m[1]=="try_wait"||m[1]=="test_wait")I.op=O_MBAR_TRY;else if(m[1]=="inval")I.op=O_MBAR_INVAL;else err("unsupported "+full);}
  else{auto f=M.find(b);if(f==M.end())err("unsupported opcode "+full);I.op=f->second;}
  I.m=m;
  if(I.op==O_SETP||I.op==O_SET){static map<string,int> C={{"eq",0},{"ne",1},{"lt",2},{"le",3},{"gt",4},{"ge",5},{"lo",2},{"ls",3},{"hi",4},{"hs",5},{"equ",8},{"neu",9},{"ltu",10},{"leu",11},{"gtu",12},{"geu",13},{"num",14},{"nan",15}};I.cmp=C.at(m[1]);I.hi=false;if(has("and"))I.bop=1;else if(has("or"))I.bop=2;else if(has("xor"))I.bop=3;if(m[1]=="hi"||m[1]=="hs"||m[1]=="lo"||m[1]=="ls"){}}
  if(I.op==O_MMA||I.op==O_WGMMA)for(auto&x:m)if(x[0]=='m'&&isdigit(x[1]))sscanf(x.c_str(),"m%dn%dk%d",&I.mm,&I.mn,&I.mk);
  if(I.op==O_LDMATRIX||I.op==O_STMATRIX){I.vec=has("x4")?4:has("x2")?2:1;}
  if(I.op==O_SHFL)I.sub=has("up")?0:has("down")?1:has("bfly")?2:3;
  if(I.op==O_VOTE)I.sub=has("all")?0:has("any")?1:has("uni")?2:3;
  if(I.op==O_ATOM||I.op==O_RED||I.op==O_REDUX){static const char*N[]={"add","min","max","and","or","xor","exch","cas","inc","dec"};for(int i=0;i<10;i++)if(has(N[i]))I.sub=i+1;}
  if(I.op==O_SHF){I.sub=has("l")?0:1;I.sat=has("clamp");}
  if(I.op==O_CVTA){I.sub=has("to");}
  if(I.op==O_WGMMA&&I.t2!=F32)err("wgmma dtype "+full);
  if(I.op==O_PRMT&&m.size()>2)err("prmt mode");
  if(I.op==O_BRA){ws();string l=ident();fix.push_back(make_tuple((int)K->code.size(),0,l));need(';');return I;}
  ws();if(!eat(';')){Ty ot=I.t;do{I.o.push_back(operand(ot));}while(eat(','));need(';');}
  if(I.op==O_CPASYNC){if(has("L2::cache_hint"))I.o.pop_back();if(I.o.size()>3&&predRegs.count(I.o[3].r))I.sub=1;} // drop the cache policy; sub 1: ignore-src predicate
  return I;}
};
// ------------------------------------------------------------------ machine
struct Range{u64 lo,hi;int flags;};
struct Copy{u32 dst;u8 n;int8_t lane;u8 data[16];};
struct VC{vector<u32> c;};
struct WgOp{const Inst*I;u64 ad,bd;bool sd;};
struct Warp{int id;vector<WgOp> wq;vector<vector<WgOp>> wgroups;vector<u8> pend;int npend=0;u32 fence=0;u32 wsync=0;vector<u32> fvc;vector<u64> rf;u32 pc[32];u32 live=0;bool uni=true;u32 upc=0;int state=0;/*0 run 1 barrier 2 done*/int barId=0;vector<vector<Copy>> groups;vector<Copy> cur;vector<u32> vc;vector<u8> local;};
struct Barrier{u32 arrived=0;u32 need=0;vector<u32> vc;vector<int> waiting;};
struct Stats{vector<u64> dyn;u64 intra=0,proxy=0,wgpend=0,warpInst=0,shWave=0,shIdeal=0,shReq=0,gSect=0,gReq=0,gIdeal=0,uninit=0,races=0,inflight=0,diverged=0;vector<pair<u64,u64>> perInst;};
struct Machine{
 Kernel*K;vector<u8> sh;vector<u8> params;vector<Range> ranges;bool checkRange=false,checkRace=true,late=true,poison=true,stats=true,perturb=false;float pt(float r){if(!perturb||!(r-r==0)||r==0)return r;return r*(1.0f+(float)((i64)(rng()>>20)%5-2)*1.1920929e-7f);}static float rz(double x){float f=(float)x;if(f-f==0&&fabs((double)f)>fabs(x))f=nextafterf(f,0.f);return f;}u64 seed=1;Stats st;
 vector<Warp> W;int nw=0;map<int,Barrier> bars;u32 ctaid[3],grid[3],blk[3];
 // shadow: 2-byte granules
 struct Sh{u32 wclk;int16_t ww;u8 init;u8 fly;u32 fe;u32 wsy;int8_t lane;};vector<Sh> shadow;vector<u32> rclk;string firstRace,firstIntra;
 const char*where(const Inst&I){static string s;s="line "+to_string(I.line)+": "+I.text;return s.c_str();}
 u64 rng(){seed^=seed<<13;seed^=seed>>7;seed^=seed<<17;return seed;}
 void race(const Inst&I,const char*k,u64 a,int w,int other){st.races++;if(firstRace.empty()){firstRace=string(k)+" at shared+"+to_string(a)+" warp "+to_string(w)+" vs warp "+to_string(other)+" "+where(I);}}
 inline void shChk(const Inst&I,Warp&w,u64 a,int n,bool wr,bool flyIssue=false,bool flyDone=false,int lane=-1){
  if(a+n>sh.size())throw Err("shared out of bounds: addr "+to_string(a)+" size "+to_string(n)+" of "+to_string(sh.size())+" "+where(I));
  if(a%n&&n<=16)throw Err(string("misaligned shared access ")+where(I));
  if(!checkRace)return;
  for(u64 g=a/2;g<(a+n+1)/2;g++){Sh&s=shadow[g];
   if(s.fly&&!flyDone){st.inflight++;if(firstRace.empty())firstRace=string("access to in-flight cp.async bytes at shared+")+to_string(2*g)+" "+where(I);}
   if(s.ww>=0&&s.ww!=w.id&&s.wclk>w.vc[s.ww])race(I,wr?"W-W":"W-R",2*g,w.id,s.ww);
   if(!wr&&s.ww==w.id&&s.wsy==w.wsync&&s.lane!=lane&&!flyDone){st.intra++;if(firstIntra.empty())firstIntra=string(wr?"W-W":"W-R")+" lanes "+to_string(lane)+"/"+to_string(s.lane)+" shared+"+to_string(2*g)+" "+where(I);}
   if(wr){u32*r=&rclk[g*nw];for(int q=0;q<nw;q++)if(q!=w.id&&r[q]>w.vc[q])race(I,"R-W",2*g,w.id,q);s.ww=w.id;s.wclk=w.vc[w.id];s.init=1;s.fe=w.fence;s.wsy=w.wsync;s.lane=(int8_t)lane;if(flyIssue)s.fly=1;if(flyDone)s.fly=0;}
   else{if(!s.init)st.uninit++;rclk[g*nw+w.id]=w.vc[w.id];}}}
 u8* ptr(const Inst&I,Warp&w,u64 a,int n,bool wr,int lane,int space){
  if(space==2){shChk(I,w,a,n,wr,false,false,lane);return &sh[a];}
  if(space==3){u64 o=a-PARAM_BASE;if(o+n>params.size())throw Err(string("param oob ")+where(I));return &params[o];}
  if(space==4||(space==0&&a>=LOCAL_BASE&&a<LOCAL_BASE+(1u<<28))){u64 o=a-LOCAL_BASE;if(o+n>(u64)K->locSize)throw Err(string("local oob ")+where(I));return &w.local[(u64)lane*K->locSize+o];}
  if(space==0&&a>=SH_BASE&&a<SH_BASE+(1u<<28)){a-=SH_BASE;shChk(I,w,a,n,wr,false,false,lane);return &sh[a];}
  if(a%n)throw Err(string("misaligned global access ")+where(I));
  if(checkRange){for(auto&r:ranges)if(a>=r.lo&&a+n<=r.hi){if(wr&&!(r.flags&2))throw Err(string("write to read-only global ")+where(I));return (u8*)a;}
   for(auto&g:K->globals)if(a>=(u64)g.data()&&a+n<=(u64)g.data()+g.size())return (u8*)a;
   char b[160];snprintf(b,160,"global out of bounds addr %llx n %d lane %d warp %d cta %u,%u,%u ",(unsigned long long)a,n,lane,w.id,ctaid[0],ctaid[1],ctaid[2]);throw Err(string(b)+where(I));}
  return (u8*)a;}
 template<class F> static inline void lanes(u32 m,F f){if(m==0xffffffffu){for(int l=0;l<32;l++)f(l);}else while(m){int l=__builtin_ctz(m);m&=m-1;f(l);}}
 u64*R(Warp&w,int r){return &w.rf[(size_t)r*32];}
 // wavefront model: n bytes per lane; group lanes so that a group moves <=128B; cost = max distinct words per bank
 void bank(const Inst&I,const u64*addr,u32 m,int n){if(!stats)return;int per=n<=4?32:n==8?16:8;u64 waves=0,ideal=0;
  for(int g=0;g<32;g+=per){u32 cnt[32]={};u64 seen[32][32];int any=0;u32 words=0;
   for(int l=g;l<g+per;l++)if(m>>l&1){any=1;for(int b=0;b<max(n,4);b+=4){u64 wd=(addr[l]+b)/4;int bk=wd%32;bool dup=false;for(u32 q=0;q<cnt[bk];q++)if(seen[bk][q]==wd)dup=true;if(!dup){seen[bk][cnt[bk]++]=wd;words++;}}}
   if(any){u32 mx=0;for(int i=0;i<32;i++)mx=max(mx,cnt[i]);waves+=mx;ideal+=(words+31)/32;}}
  st.shWave+=waves;st.shIdeal+=ideal;st.shReq++;int pc=(int)(&I-&K->code[0]);st.perInst[pc].first+=waves;st.perInst[pc].second+=ideal;}
 void coalesce(const u64*addr,u32 m,int n){if(!stats)return;u64 s[96];int k=0;int c=0;for(int l=0;l<32;l++)if(m>>l&1){c++;for(u64 q=addr[l]/32;q<=(addr[l]+n-1)/32;q++){bool d=false;for(int j=k-1;j>=0;j--)if(s[j]==q){d=true;break;}if(!d)s[k++]=q;}}st.gSect+=k;st.gIdeal+=(c*n+31)/32;st.gReq++;}
 void flush(const Inst&I,Warp&w,size_t keep){while(w.groups.size()>keep){for(auto&c:w.groups.front()){shChk(I,w,c.dst,c.n,true,false,true,c.lane);if(late)memcpy(&sh[c.dst],c.data,c.n);}w.groups.erase(w.groups.begin());}}
 static float mmaIn(u64 r,int h,Ty t){u16 v=(u16)(r>>(16*h));return t==BF16?b2f(v):h2f(v);}
 static float tf(u64 r){return u2f(r&0xffffe000u);}
 float wg(const Inst&I,Warp&w,u64 desc,int mn,int k,bool mnMajor,Ty t,vector<u8>&touched){
  u32 start=(desc&0x3fff)<<4,lbo=((desc>>16)&0x3fff)<<4,sbo=((desc>>32)&0x3fff)<<4;int sw=(desc>>62)&3;int bits=sw==1?3:sw==2?2:sw==3?1:0;u32 a=start;int U=1<<bits; // U units of 16B in swizzle span
  if(!mnMajor){u32 kb=k*2;if(bits==0)a+=(mn/8)*sbo+(mn%8)*16+(kb/16)*lbo+kb%16;else a+=(mn/8)*sbo+(mn%8)*16*U+kb;}
  else{int u=mn/8;u32 in=(mn%8)*2;if(bits==0)a+=u*sbo+(k%8)*16+(k/8)*lbo+in;else a+=(u%U)*16+(u/U)*lbo+(k%8)*16*U+(k/8)*sbo+in;}
  if(bits)a^=((a>>7)&(U-1))<<4;
  if(a+2>sh.size())throw Err(string("wgmma shared oob ")+where(I));if(checkRace&&!touched[a/2]){touched[a/2]=1;shChk(I,w,a,2,false);Sh&s=shadow[a/2];if(s.ww>=0&&!(W[s.ww].fence>s.fe||(s.ww!=w.id&&w.fvc[s.ww]>=s.wclk))){st.proxy++;if(firstRace.empty())firstRace=string("wgmma reads shared bytes written without a later fence.proxy.async ")+where(I);}}u16 v;memcpy(&v,&sh[a],2);return t==BF16?b2f(v):h2f(v);}
 // returns: 0 continue, 1 blocked/yield
 int step(Warp&w){
  u32 pc,act;if(w.uni){pc=w.upc;act=w.live;}else{pc=~0u;for(int l=0;l<32;l++)if(w.live>>l&1)pc=min(pc,w.pc[l]);act=0;for(int l=0;l<32;l++)if((w.live>>l&1)&&w.pc[l]==pc)act|=1u<<l;if(act==w.live){w.uni=true;w.upc=pc;}else st.diverged++;}
  if(pc>=K->code.size()){w.live=0;w.state=2;return 1;}
  const Inst&I=K->code[pc];u32 m=act;if(I.pred>=0){u64*p=R(w,I.pred);u32 pm=0;for(int l=0;l<32;l++)pm|=(u32)(p[l]&1)<<l;if(I.pneg)pm=~pm;m&=pm;}
  st.warpInst++;if(m)st.dyn[I.stat]++;
  auto adv=[&](){if(w.uni)w.upc=pc+1;else lanes(act,[&](int l){w.pc[l]=pc+1;});};
  if(I.op==O_BRA){if(m==act){if(w.uni)w.upc=I.target;else lanes(act,[&](int l){w.pc[l]=I.target;});}else if(m==0)adv();else{if(w.uni){w.uni=false;}lanes(act,[&](int l){w.pc[l]=(m>>l&1)?I.target:pc+1;});}return 0;}
  if(I.op==O_RET){if(m!=act){if(w.uni){w.uni=false;}lanes(act,[&](int l){w.pc[l]=pc+1;});}w.live&=~m;if(!w.live){w.state=2;return 1;}if(w.uni)w.uni=false,lanes(w.live,[&](int l){w.pc[l]=pc+1;});return 0;}
  if(I.op==O_BAR||I.op==O_BARARRIVE){if(!m){adv();return 0;}if(m!=w.live)throw Err(string("barrier in divergent code (not all live lanes) ")+where(I));adv();
   int id=I.o.size()?(int)R(w,I.o[0].r)[0]:0;int need=I.o.size()>1?(int)R(w,I.o[1].r)[0]/32:-1;Barrier&B=bars[id];B.need=need;if(B.vc.empty())B.vc.assign(nw,0);for(int q=0;q<nw;q++)B.vc[q]=max(B.vc[q],w.vc[q]);B.arrived++;w.vc[w.id]++;w.wsync++;
   if(I.op==O_BAR){B.waiting.push_back(w.id);w.state=1;w.barId=id;return 1;}return 1;}
  adv();if(!m)return 0;
  if(w.npend&&I.op!=O_WGMMA){for(auto&o:I.o){auto bad=[&](int r){if(r>=0&&w.pend[r]){st.wgpend++;if(firstRace.empty())firstRace=string("wgmma accumulator touched before wait_group ")+where(I);}};bad(o.r);for(int r:o.v)bad(r);}}
  exec(I,w,m,act);return (I.op==O_MBAR_TRY)?1:0;}
 bool release(){bool any=false;int liveW=0;for(auto&w:W)if(w.state!=2)liveW++;
  for(auto&kv:bars){Barrier&B=kv.second;if(B.waiting.empty())continue;u32 need=(int)B.need>0?B.need:liveW;if(B.arrived>=need){for(int q:B.waiting){Warp&w=W[q];for(int j=0;j<nw;j++)if(j!=q)w.vc[j]=max(w.vc[j],B.vc[j]);w.state=0;}B.waiting.clear();B.arrived=0;B.vc.assign(nw,0);any=true;}}
  return any;}
 void exec(const Inst&I,Warp&w,u32 m,u32 act);void wgRun(const Inst&I,Warp&w,u64 ad,u64 bd,bool sd);
 void runCta(){
  int nt=blk[0]*blk[1]*blk[2];nw=(nt+31)/32;W.assign(nw,{});bars.clear();if(poison)for(size_t i=0;i+1<sh.size();i+=2){sh[i]=0xff;sh[i+1]=0x7f;}
  if(checkRace){shadow.assign(sh.size()/2+1,Sh{0,-1,0,0,0,0,-1});rclk.assign((sh.size()/2+1)*nw,0);}
  for(int i=0;i<nw;i++){Warp&w=W[i];w.id=i;w.rf.assign((size_t)K->nreg*32,0xDEADBEEFCAFEBABEull);w.vc.assign(nw,0);w.fvc.assign(nw,0);w.vc[i]=1;w.pend.assign(K->nreg,0);w.local.assign((size_t)K->locSize*32,0xAB);for(int l=0;l<32;l++){int t=i*32+l;if(t<nt)w.live|=1u<<l;w.pc[l]=0;}
   for(auto&c:K->consts)for(int l=0;l<32;l++)w.rf[(size_t)c.first*32+l]=c.second;
   for(auto&s:K->sregs)for(int l=0;l<32;l++){int t=i*32+l;u64 v=0;switch(s.first){case SR_TIDX:v=t%blk[0];break;case SR_TIDY:v=t/blk[0]%blk[1];break;case SR_TIDZ:v=t/blk[0]/blk[1];break;case SR_NTIDX:v=blk[0];break;case SR_NTIDY:v=blk[1];break;case SR_NTIDZ:v=blk[2];break;
     case SR_CTAX:v=ctaid[0];break;case SR_CTAY:v=ctaid[1];break;case SR_CTAZ:v=ctaid[2];break;case SR_NCTAX:v=grid[0];break;case SR_NCTAY:v=grid[1];break;case SR_NCTAZ:v=grid[2];break;case SR_LANE:v=l;break;case SR_WARP:v=i;break;
     case SR_LMEQ:v=1u<<l;break;case SR_LMLT:v=(1u<<l)-1;break;case SR_LMLE:v=(u32)((2ull<<l)-1);break;case SR_LMGT:v=(u32)~((2ull<<l)-1);break;case SR_LMGE:v=(u32)~((1ull<<l)-1);break;case SR_NWARP:v=nw;break;case SR_ONE:v=1;break;case SR_DYNSM:case SR_TOTSM:v=sh.size();break;}
     w.rf[(size_t)s.second*32+l]=v;}}
  u64 guard=0;while(true){vector<int> run;for(auto&w:W)if(w.state==0)run.push_back(w.id);
   if(run.empty()){if(release())continue;bool done=true;for(auto&w:W)if(w.state!=2)done=false;if(done)break;throw Err("deadlock: warps wait at barrier");}
   Warp&w=W[run[rng()%run.size()]];int q=1+rng()%400;while(q--&&!step(w));release();if(++guard>200000000ull)throw Err("runaway");}
  for(auto&w:W)if(!w.groups.empty()||!w.cur.empty()){/* cp.async never waited for: legal but suspicious */}
 }
};
static inline float mulz(float a,float b,bool z){if(z){a=ftzf(a);b=ftzf(b);}float r=a*b;return z?ftzf(r):r;}
void Machine::wgRun(const Inst&I,Warp&w,u64 adsc,u64 bd,bool sd){auto S=[&](int i)->u64*{return R(w,I.o[i].r);};
Ty at=I.t;if(at!=BF16&&at!=F16)throw Err(string("wgmma type ")+where(I));int N=I.mn,k=16;const Opnd&od=I.o[0];bool areg=I.o[1].k==2;int sa=(int)(i32)S(4)[0],sb=(int)(i32)S(5)[0];int ta=0,tb=0;if(areg)tb=(int)S(6)[0];else{ta=(int)S(6)[0];tb=(int)S(7)[0];}
  vector<u8> tch(checkRace?sh.size()/2+1:0);static thread_local vector<float> Bm;Bm.resize(16*N);for(int q=0;q<k;q++)for(int n=0;n<N;n++)Bm[q*N+n]=wg(I,w,bd,n,q,tb,at,tch)*sb;float A[16][16];int wr=(w.id%4)*16;
  if(areg)for(int l=0;l<32;l++)for(int i=0;i<4;i++)for(int h=0;h<2;h++)A[l/4+8*(i&1)][(l%4)*2+h+8*(i>>1)]=sa*mmaIn(R(w,I.o[1].v[i])[l],h,at);
  else{for(int r=0;r<16;r++)for(int q=0;q<16;q++)A[r][q]=sa*wg(I,w,adsc,wr+r,q,ta,at,tch);}
  vector<double> acc(N);for(int r=0;r<16;r++){for(int n=0;n<N;n++){int l=(r%8)*4+(n%8)/2,i=(n/8)*4+(r/8)*2+(n&1);acc[n]=sd?u2f(R(w,od.v[i])[l]):0;}for(int q=0;q<16;q++)for(int n=0;n<N;n++)acc[n]+=(double)A[r][q]*Bm[q*N+n];for(int n=0;n<N;n++){int l=(r%8)*4+(n%8)/2,i=(n/8)*4+(r/8)*2+(n&1);R(w,od.v[i])[l]=f2u(perturb?rz(acc[n]):(float)acc[n]);}}}
void Machine::exec(const Inst&I,Warp&w,u32 m,u32 act){
 auto S=[&](int i)->u64*{return R(w,I.o[i].r);};
 if(I.rnd==1)throw Err(string("rounding mode other than rn is not modelled: ")+where(I));
 switch(I.op){
 case O_NOP:break;
 case O_MOV:{if(I.o[0].k==2){int n=I.o[0].v.size();int bits=tsz(I.t)*8/n;u64*s=S(1);lanes(m,[&](int l){u64 v=s[l];for(int i=0;i<n;i++)R(w,I.o[0].v[i])[l]=(v>>(bits*i))&(bits==64?~0ull:(1ull<<bits)-1);});}
  else if(I.o[1].k==2){int n=I.o[1].v.size();int bits=tsz(I.t)*8/n;u64*d=S(0);lanes(m,[&](int l){u64 v=0;for(int i=0;i<n;i++)v|=(R(w,I.o[1].v[i])[l]&((1ull<<bits)-1))<<(bits*i);d[l]=v;});}
  else{u64*d=S(0),*s=S(1);int sz=tsz(I.t);if(I.t==T_P)lanes(m,[&](int l){d[l]=s[l]&1;});else lanes(m,[&](int l){d[l]=maskw(s[l],sz);});}break;}
 case O_CVTA:{u64*d=S(0),*s=S(1);int sp=I.space;lanes(m,[&](int l){u64 v=s[l];if(sp==2)v=I.sub?v-SH_BASE:v+SH_BASE;d[l]=v;});break;}
 case O_LD:case O_ST:{bool ld=I.op==O_LD;const Opnd&mem=I.o[ld?1:0],&val=I.o[ld?0:1];int sz=tsz(I.t),n=sz*I.vec;u64*a=R(w,mem.r);u64 ad[32];int sp=I.space;
  if(sp==2)lanes(m,[&](int l){ad[l]=(u32)(a[l]+mem.off);});else lanes(m,[&](int l){ad[l]=a[l]+mem.off;});
  if(sp==2)bank(I,ad,m,n);else if(sp==1||sp==0)coalesce(ad,m,n);
  lanes(m,[&](int l){u8*q=ptr(I,w,ad[l],n,!ld,l,sp);for(int e=0;e<I.vec;e++){u64*r=R(w,val.k==2?val.v[e]:val.r);if(ld){u64 v=0;memcpy(&v,q+e*sz,sz);if(isS(I.t))v=(u64)sext(v,sz);r[l]=v;}else memcpy(q+e*sz,&r[l],sz);}});break;}
 case O_ADD:case O_SUB:case O_MUL:case O_MIN:case O_MAX:{u64*d=S(0),*a=S(1),*b=S(2);Ty t=I.t;
  if(t==F32){bool z=I.ftz;auto in=[&](u64 x){float f=u2f(x);return z?ftzf(f):f;};auto out=[&](float f){if(z)f=ftzf(f);if(I.sat)f=f>0?(f<1?f:1):0;return f2u(f);};
   if(I.rnd==1)throw Err(string("rz ")+where(I));
   switch(I.op){case O_ADD:lanes(m,[&](int l){d[l]=out(in(a[l])+in(b[l]));});break;case O_SUB:lanes(m,[&](int l){d[l]=out(in(a[l])-in(b[l]));});break;case O_MUL:lanes(m,[&](int l){d[l]=out(in(a[l])*in(b[l]));});break;
    case O_MIN:case O_MAX:{bool nan=find(I.m.begin(),I.m.end(),"NaN")!=I.m.end();lanes(m,[&](int l){float x=in(a[l]),y=in(b[l]);float r;if(nan&&(x!=x||y!=y))r=NAN;else r=I.op==O_MIN?fminf(x,y):fmaxf(x,y);if(x==0&&y==0)r=I.op==O_MIN?(signbit(x)?x:y):(signbit(x)?y:x);d[l]=r!=r?0x7fffffff:f2u(r);});break;}default:;}break;}
  if(t==F64){lanes(m,[&](int l){double x=u2d(a[l]),y=u2d(b[l]);d[l]=d2u(I.op==O_ADD?x+y:I.op==O_SUB?x-y:I.op==O_MUL?x*y:I.op==O_MIN?fmin(x,y):fmax(x,y));});break;}
  if(t==F16||t==BF16||t==F16X2||t==BF16X2){Ty e=(t==F16||t==F16X2)?F16:BF16;int n=(t==F16X2||t==BF16X2)?2:1;lanes(m,[&](int l){u64 o=0;for(int i=0;i<n;i++){float x=getf((a[l]>>(16*i))&0xffff,e),y=getf((b[l]>>(16*i))&0xffff,e);float r=I.op==O_ADD?x+y:I.op==O_SUB?x-y:I.op==O_MUL?x*y:I.op==O_MIN?fminf(x,y):fmaxf(x,y);o|=putf(r,e)<<(16*i);}d[l]=o;});break;}
  int sz=tsz(t);if(I.op==O_MUL){if(I.wide){if(isS(t))lanes(m,[&](int l){d[l]=maskw((u64)(sext(a[l],sz)*sext(b[l],sz)),sz*2);});else lanes(m,[&](int l){d[l]=maskw(maskw(a[l],sz)*maskw(b[l],sz),sz*2);});}
   else if(I.hi){lanes(m,[&](int l){if(isS(t)){__int128 p=(__int128)sext(a[l],sz)*sext(b[l],sz);d[l]=maskw((u64)(p>>(8*sz)),sz);}else{unsigned __int128 p=(unsigned __int128)maskw(a[l],sz)*maskw(b[l],sz);d[l]=maskw((u64)(p>>(8*sz)),sz);}});}
   else lanes(m,[&](int l){d[l]=maskw(a[l]*b[l],sz);});break;}
  if(I.op==O_ADD)lanes(m,[&](int l){d[l]=maskw(a[l]+b[l],sz);});else if(I.op==O_SUB)lanes(m,[&](int l){d[l]=maskw(a[l]-b[l],sz);});
  else lanes(m,[&](int l){if(isS(t)){i64 x=sext(a[l],sz),y=sext(b[l],sz);d[l]=maskw((u64)(I.op==O_MIN?min(x,y):max(x,y)),sz);}else{u64 x=maskw(a[l],sz),y=maskw(b[l],sz);d[l]=I.op==O_MIN?min(x,y):max(x,y);}});break;}
 case O_MAD:case O_FMA:{u64*d=S(0),*a=S(1),*b=S(2),*c=S(3);Ty t=I.t;if(t==F32){bool z=I.ftz;lanes(m,[&](int l){float x=u2f(a[l]),y=u2f(b[l]),q=u2f(c[l]);if(z){x=ftzf(x);y=ftzf(y);q=ftzf(q);}float r=fmaf(x,y,q);if(z)r=ftzf(r);if(I.sat)r=r>0?(r<1?r:1):0;d[l]=f2u(r);});break;}
  if(t==F64){lanes(m,[&](int l){d[l]=d2u(fma(u2d(a[l]),u2d(b[l]),u2d(c[l])));});break;}
  if(t==F16||t==BF16||t==F16X2||t==BF16X2){Ty e=(t==F16||t==F16X2)?F16:BF16;int n=(t==F16X2||t==BF16X2)?2:1;lanes(m,[&](int l){u64 o=0;for(int i=0;i<n;i++){int s=16*i;double r=(double)getf((a[l]>>s)&0xffff,e)*getf((b[l]>>s)&0xffff,e)+getf((c[l]>>s)&0xffff,e);float f=(float)r;if(I.relu&&f<0)f=0;o|=putf(f,e)<<s;}d[l]=o;});break;}
  int sz=tsz(t);if(I.wide)lanes(m,[&](int l){u64 p=isS(t)?(u64)(sext(a[l],sz)*sext(b[l],sz)):maskw(a[l],sz)*maskw(b[l],sz);d[l]=maskw(p+c[l],sz*2);});
  else if(I.hi)lanes(m,[&](int l){u64 p;if(isS(t))p=(u64)(((__int128)sext(a[l],sz)*sext(b[l],sz))>>(8*sz));else p=(u64)(((unsigned __int128)maskw(a[l],sz)*maskw(b[l],sz))>>(8*sz));d[l]=maskw(p+c[l],sz);});
  else lanes(m,[&](int l){d[l]=maskw(a[l]*b[l]+c[l],sz);});break;}
 case O_DIV:case O_REM:{u64*d=S(0),*a=S(1),*b=S(2);Ty t=I.t;int sz=tsz(t);if(t==F32){lanes(m,[&](int l){float x=u2f(a[l]),y=u2f(b[l]);if(I.ftz){x=ftzf(x);y=ftzf(y);}float r=x/y;if(I.m.size()>1&&(I.m[1]=="full"||I.m[1]=="approx"))r=pt(r);d[l]=f2u(I.ftz?ftzf(r):r);});break;}if(t==F64){lanes(m,[&](int l){d[l]=d2u(u2d(a[l])/u2d(b[l]));});break;}
  lanes(m,[&](int l){if(isS(t)){i64 x=sext(a[l],sz),y=sext(b[l],sz);d[l]=maskw(y==0?~0ull:(u64)(I.op==O_DIV?(y==-1?-x:x/y):(y==-1?0:x%y)),sz);}else{u64 x=maskw(a[l],sz),y=maskw(b[l],sz);d[l]=y==0?maskw(~0ull,sz):I.op==O_DIV?x/y:x%y;}});break;}
 case O_ABS:case O_NEG:{u64*d=S(0),*a=S(1);Ty t=I.t;int sz=tsz(t);if(isF(t)){u64 sb=1ull<<(8*sz-1);lanes(m,[&](int l){d[l]=I.op==O_ABS?maskw(a[l],sz)&~sb:maskw(a[l],sz)^sb;});}
  else if(t==F16X2||t==BF16X2)lanes(m,[&](int l){d[l]=I.op==O_ABS?a[l]&0x7fff7fff:(a[l]&0xffffffff)^0x80008000;});else lanes(m,[&](int l){i64 x=sext(a[l],sz);d[l]=maskw((u64)(I.op==O_ABS?(x<0?-x:x):-x),sz);});break;}
 case O_AND:{u64*d=S(0),*a=S(1),*b=S(2);int sz=tsz(I.t);lanes(m,[&](int l){d[l]=maskw(a[l]&b[l],sz);});break;}
 case O_OR:{u64*d=S(0),*a=S(1),*b=S(2);int sz=tsz(I.t);lanes(m,[&](int l){d[l]=maskw(a[l]|b[l],sz);});break;}
 case O_XOR:{u64*d=S(0),*a=S(1),*b=S(2);int sz=tsz(I.t);lanes(m,[&](int l){d[l]=maskw(a[l]^b[l],sz);});break;}
 case O_NOT:{u64*d=S(0),*a=S(1);int sz=tsz(I.t);if(I.t==T_P)lanes(m,[&](int l){d[l]=!(a[l]&1);});else lanes(m,[&](int l){d[l]=maskw(~a[l],sz);});break;}
 case O_SHL:case O_SHR:{u64*d=S(0),*a=S(1),*b=S(2);int sz=tsz(I.t),bits=sz*8;lanes(m,[&](int l){u32 n=(u32)b[l];if(I.op==O_SHL)d[l]=n>=(u32)bits?0:maskw(a[l]<<n,sz);else if(isS(I.t))d[l]=maskw((u64)(sext(a[l],sz)>>(n>=(u32)bits?bits-1:n)),sz);else d[l]=n>=(u32)bits?0:maskw(a[l],sz)>>n;});break;}
 case O_SETP:case O_SET:{u64*a=S(1),*b=S(2);u64*d=S(0);Ty t=I.t;int c=I.cmp;u64*pc=I.o.size()>3?S(3):nullptr;bool pn=I.o.size()>3&&I.o[3].neg;u64*d2=I.o[0].r2>=0?R(w,I.o[0].r2):nullptr;int sz=tsz(t);
  lanes(m,[&](int l){bool r;if(isF(t)){double x,y;if(t==F64){x=u2d(a[l]);y=u2d(b[l]);}else{float p=getf(a[l],t),q=getf(b[l],t);if(I.ftz){p=ftzf(p);q=ftzf(q);}x=p;y=q;}bool un=x!=x||y!=y;switch(c&7){case 0:r=x==y;break;case 1:r=x!=y&&!un;break;case 2:r=x<y;break;case 3:r=x<=y;break;case 4:r=x>y;break;default:r=x>=y;}if(c==14)r=!un;else if(c==15)r=un;else if(c>=8)r=r||un;}
   else if(isS(t)){i64 x=sext(a[l],sz),y=sext(b[l],sz);switch(c){case 0:r=x==y;break;case 1:r=x!=y;break;case 2:r=x<y;break;case 3:r=x<=y;break;case 4:r=x>y;break;default:r=x>=y;}}
   else{u64 x=maskw(a[l],sz),y=maskw(b[l],sz);switch(c){case 0:r=x==y;break;case 1:r=x!=y;break;case 2:r=x<y;break;case 3:r=x<=y;break;case 4:r=x>y;break;default:r=x>=y;}}
   bool r2=!r;if(I.bop){bool q=(pc[l]&1)!=0;if(pn)q=!q;auto f=[&](bool x){return I.bop==1?x&&q:I.bop==2?x||q:x!=q;};r2=f(!r);r=f(r);}
   if(I.op==O_SETP){d[l]=r;if(d2)d2[l]=r2;}else d[l]=I.t2==F32?f2u(r?1.f:0.f):(r?maskw(~0ull,tsz(I.t2)):0);});break;}
 case O_SELP:{u64*d=S(0),*a=S(1),*b=S(2),*p=S(3);int sz=tsz(I.t);bool ng=I.o[3].neg;lanes(m,[&](int l){d[l]=maskw(((p[l]&1)!=0)!=ng?a[l]:b[l],sz);});break;}
 case O_CVT:{Ty dt=I.t2,stt=I.t;u64*d=S(0);u64*a=S(1);
  if(dt==BF16X2||dt==F16X2){Ty e=dt==BF16X2?BF16:F16;u64*b=S(2);lanes(m,[&](int l){float x=u2f(a[l]),y=u2f(b[l]);if(I.relu){x=x>0?x:0;y=y>0?y:0;}d[l]=(putf(x,e)<<16)|putf(y,e);});break;}
  lanes(m,[&](int l){u64 v=a[l];if(isF(stt)){double x=stt==F64?u2d(v):getf(v,stt);if(I.ftz)x=ftzf((float)x);
    if(I.rnd==2)x=trunc(x);else if(I.rnd==3)x=nearbyint(x);else if(I.rnd==4)x=floor(x);else if(I.rnd==5)x=ceil(x);
    if(isF(dt)){if(dt==F64)d[l]=d2u(x);else{float f=(float)x;if(I.sat)f=f>0?(f<1?f:1):0;if(I.rnd==1&&dt!=F32)throw Err(string("cvt.rz ")+where(I));if(I.ftz)f=ftzf(f);d[l]=putf(f,dt);}}
    else if(dt==TF32){u32 u=(u32)f2u((float)x);u+=0x1000;d[l]=u&0xffffe000u;}
    else{int sz=tsz(dt);if(x!=x)d[l]=0;else if(isS(dt)){double lo=-ldexp(1,sz*8-1),hi=ldexp(1,sz*8-1)-1;d[l]=maskw((u64)(i64)(x<lo?lo:x>=hi?(double)hi:x),sz);if(x>=ldexp(1,sz*8-1))d[l]=maskw((1ull<<(sz*8-1))-1,sz);}else{double hi=ldexp(1,sz*8);d[l]=x<=0?0:x>=hi?maskw(~0ull,sz):(u64)x;}}}
   else{int sz=tsz(stt);u64 q=isS(stt)?(u64)sext(v,sz):maskw(v,sz);if(isF(dt)){if(dt==F64)d[l]=d2u(isS(stt)?(double)(i64)q:(double)q);else d[l]=putf(isS(stt)?(float)(i64)q:(float)q,dt);}
    else{int ds=tsz(dt);if(I.sat){if(isS(stt)){i64 x=(i64)q;if(isS(dt)){i64 hi=(i64)((1ull<<(8*ds-1))-1);x=max(-hi-1,min(hi,x));}else x=max<i64>(0,x);q=(u64)x;}}d[l]=maskw(q,ds);if(isS(dt)&&ds<4)d[l]=(u64)sext(q,ds)&0xffffffff;}}});break;}
 case O_EX2:case O_LG2:case O_RCP:case O_SQRT:case O_RSQRT:case O_SIN:case O_COS:case O_TANH:{u64*d=S(0),*a=S(1);Ty t=I.t;auto f=[&](double x)->double{switch(I.op){case O_EX2:return exp2(x);case O_LG2:return log2(x);case O_RCP:return 1/x;case O_SQRT:return sqrt(x);case O_RSQRT:return 1/sqrt(x);case O_SIN:return sin(x);case O_COS:return cos(x);default:return tanh(x);}};
  if(t==F64)lanes(m,[&](int l){d[l]=d2u(f(u2d(a[l])));});else if(t==F16X2||t==BF16X2){Ty e=t==F16X2?F16:BF16;lanes(m,[&](int l){d[l]=putf(f(getf(a[l]&0xffff,e)),e)|putf(f(getf((a[l]>>16)&0xffff,e)),e)<<16;});}
  else lanes(m,[&](int l){float x=getf(a[l],t);if(I.ftz)x=ftzf(x);float r=(float)f(x);if(t==F32&&I.m.size()>1&&I.m[1]=="approx")r=pt(r);if(I.ftz)r=ftzf(r);d[l]=putf(r,t);});break;}
 case O_PRMT:{u64*d=S(0),*a=S(1),*b=S(2),*c=S(3);lanes(m,[&](int l){u64 v=(a[l]&0xffffffff)|(b[l]<<32);u32 r=0;for(int i=0;i<4;i++){u32 s=(c[l]>>(4*i))&15;u32 y=(v>>(8*(s&7)))&255;if(s&8)y=(y&128)?255:0;r|=y<<(8*i);}d[l]=r;});break;}
 case O_BFE:{u64*d=S(0),*a=S(1),*b=S(2),*c=S(3);int sz=tsz(I.t),W8=sz*8;lanes(m,[&](int l){u32 pos=b[l]&255,len=c[l]&255;u64 v=maskw(a[l],sz);bool sg=isS(I.t);u64 sb=0;if(sg&&len)sb=(v>>min<u32>(pos+len-1,W8-1))&1;u64 r=0;if(pos<(u32)W8)r=v>>pos;if(len<(u32)W8)r&=(1ull<<len)-1;u32 eff=pos>=(u32)W8?0:min<u32>(len,W8-pos);if(sg&&sb&&eff<(u32)W8)r|=~0ull<<eff;d[l]=maskw(len?r:0,sz);});break;}
 case O_BFI:{u64*d=S(0),*a=S(1),*b=S(2),*p=S(3),*q=S(4);int sz=tsz(I.t);lanes(m,[&](int l){u32 pos=p[l]&255,len=q[l]&255;u64 mk=(len>=64?~0ull:((1ull<<len)-1));mk=pos>=64?0:mk<<pos;d[l]=maskw((b[l]&~mk)|((pos>=64?0:a[l]<<pos)&mk),sz);});break;}
 case O_POPC:{u64*d=S(0),*a=S(1);int sz=tsz(I.t);lanes(m,[&](int l){d[l]=__builtin_popcountll(maskw(a[l],sz));});break;}
 case O_CLZ:{u64*d=S(0),*a=S(1);int sz=tsz(I.t);lanes(m,[&](int l){u64 v=maskw(a[l],sz);d[l]=v?__builtin_clzll(v)-(64-8*sz):8*sz;});break;}
 case O_BREV:{u64*d=S(0),*a=S(1);int n=tsz(I.t)*8;lanes(m,[&](int l){u64 r=0;for(int i=0;i<n;i++)r|=((a[l]>>i)&1)<<(n-1-i);d[l]=r;});break;}
 case O_SHF:{u64*d=S(0),*a=S(1),*b=S(2),*c=S(3);lanes(m,[&](int l){u32 n=(u32)c[l];n=I.sat?min(n,32u):n&31;u64 v=(a[l]&0xffffffff)|(b[l]<<32);d[l]=(I.sub==0?(u32)((v<<n)>>32):(u32)(v>>n));});break;}
 case O_LOP3:{u64*d=S(0),*a=S(1),*b=S(2),*c=S(3);u32 lut=(u32)S(4)[0];lanes(m,[&](int l){u32 x=a[l],y=b[l],z=c[l],r=0;for(int i=0;i<8;i++)if(lut>>i&1)r|=((i&4)?x:~x)&((i&2)?y:~y)&((i&1)?z:~z);d[l]=r;});break;}
 case O_COPYSIGN:{u64*d=S(0),*a=S(1),*b=S(2);lanes(m,[&](int l){d[l]=(b[l]&0x7fffffff)|(a[l]&0x80000000);});break;}
 case O_SHFL:{u64*d=S(0),*a=S(1),*b=S(2),*c=S(3);u64*pd=I.o[0].r2>=0?R(w,I.o[0].r2):nullptr;u32 mem=I.o.size()>4?(u32)S(4)[__builtin_ctz(m)]:~0u;if((mem&w.live)!=m)throw Err(string("shfl.sync: active lanes differ from membermask ")+where(I));u64 src[32];memcpy(src,a,sizeof src);
  lanes(m,[&](int l){u32 bv=b[l]&31,cv=(u32)c[l];u32 seg=(cv>>8)&31,cl=cv&31;int maxL=(l&seg)|(cl&~seg),minL=l&seg;int j;bool ok;switch(I.sub){case 0:j=l-(int)bv;ok=j>=maxL;break;case 1:j=l+bv;ok=j<=maxL;break;case 2:j=l^bv;ok=j<=maxL;break;default:j=minL|(bv&~seg);ok=j<=maxL;}if(!ok)j=l;if(!(w.live>>j&1))throw Err(string("shfl from exited lane ")+where(I));d[l]=src[j]&0xffffffff;if(pd)pd[l]=ok;});break;}
 case O_VOTE:{u64*d=S(0),*a=S(1);bool ng=I.o[1].neg;u32 bal=0;lanes(m,[&](int l){if(((a[l]&1)!=0)!=ng)bal|=1u<<l;});u32 mem=(u32)S(2)[__builtin_ctz(m)]&w.live;if(mem!=m)throw Err(string("vote.sync mask ")+where(I));u64 r=I.sub==0?bal==m:I.sub==1?bal!=0:I.sub==2?(bal==0||bal==m):bal;lanes(m,[&](int l){d[l]=r;});break;}
 case O_REDUX:{u64*d=S(0),*a=S(1);u64 r=0;bool f=true;lanes(m,[&](int l){u64 v=a[l]&0xffffffff;if(f){r=v;f=false;}else switch(I.sub){case 1:r+=v;break;case 2:r=isS(I.t)?(u64)min((i32)r,(i32)v):min(r,v);break;case 3:r=isS(I.t)?(u64)max((i32)r,(i32)v):max(r,v);break;case 4:r&=v;break;case 5:r|=v;break;default:r^=v;}});lanes(m,[&](int l){d[l]=r&0xffffffff;});break;}
 case O_ACTIVEMASK:{u64*d=S(0);lanes(m,[&](int l){d[l]=m;});break;}
 case O_ELECT:{u64*pd=I.o[0].r2>=0?R(w,I.o[0].r2):nullptr;u64*d=S(0);int e=__builtin_ctz(m);lanes(m,[&](int l){d[l]=e;if(pd)pd[l]=l==e;});break;}
 case O_WARPSYNC:w.wsync++;break;
 case O_CPASYNC:{const Opnd&dm=I.o[0],&sm=I.o[1];int n=(int)S(2)[0];u64*ss=I.o.size()>3?S(3):nullptr;u64*da=R(w,dm.r),*sa=R(w,sm.r);u64 ad[32],sd[32];lanes(m,[&](int l){ad[l]=(u32)(da[l]+dm.off);sd[l]=sa[l]+sm.off;});bank(I,ad,m,n);coalesce(sd,m,n);
  lanes(m,[&](int l){int k=!ss?n:I.sub?(((ss[l]&1)!=0)!=I.o[3].neg?0:n):(int)min<u64>(ss[l]&0xffffffff,n);Copy c;c.dst=(u32)ad[l];c.n=n;c.lane=l;memset(c.data,0,16);if(k){u8*q=ptr(I,w,sd[l],k==n?n:1,false,l,1);if(k<n)ptr(I,w,sd[l]+k-1,1,false,l,1);memcpy(c.data,q,k);}shChk(I,w,c.dst,n,true,true,false,l);if(!late)memcpy(&sh[c.dst],c.data,n);w.cur.push_back(c);});break;}
 case O_CPCOMMIT:w.groups.push_back(std::move(w.cur));w.cur.clear();break;
 case O_CPWAIT:flush(I,w,(size_t)S(0)[0]);break;
 case O_CPWAITALL:w.groups.push_back(std::move(w.cur));w.cur.clear();flush(I,w,0);break;
 case O_LDMATRIX:case O_STMATRIX:{if(m!=~0u)throw Err(string("ldmatrix: warp not converged ")+where(I));bool ld=I.op==O_LDMATRIX;const Opnd&mem=I.o[ld?1:0],&val=I.o[ld?0:1];u64*a=R(w,mem.r);
  for(int q=0;q<I.vec;q++){u64 ad[32];u32 rm=0;for(int r=0;r<8;r++){ad[q*8+r]=(u32)(a[q*8+r]+mem.off);rm|=1u<<(q*8+r);shChk(I,w,ad[q*8+r],16,!ld);}bank(I,ad,rm,16);
   u64*d=R(w,val.k==2?val.v[q]:val.r);for(int l=0;l<32;l++){if(ld){u32 v=0;for(int h=0;h<2;h++){int r=l/4,c=(l%4)*2+h;if(I.trans)swap(r,c);u16 x;memcpy(&x,&sh[ad[q*8+r]+2*c],2);v|=(u32)x<<(16*h);}d[l]=v;}else for(int h=0;h<2;h++){int r=l/4,c=(l%4)*2+h;if(I.trans)swap(r,c);u16 x=(u16)(d[l]>>(16*h));memcpy(&sh[ad[q*8+r]+2*c],&x,2);}}}break;}
 case O_MMA:{if(m!=~0u)throw Err(string("mma: warp not converged ")+where(I));if(I.mm!=16||I.mn!=8)throw Err(string("mma shape ")+where(I));
  Ty ct=I.mt[3],at=I.mt[1],dt=I.mt[0];int k=I.mk;float A[16][32],B[32][8],C[16][8];const Opnd&oa=I.o[1],&ob=I.o[2],&oc=I.o[3],&od=I.o[0];
  auto reg=[&](const Opnd&o,int i){return R(w,o.k==2?o.v[i]:o.r);};
  for(int l=0;l<32;l++){int g=l/4,t=l%4;
   if(at==F16||at==BF16){int na=k/4; for(int i=0;i<na;i++)for(int h=0;h<2;h++){A[g+8*(i&1)][t*2+h+8*(i>>1)]=mmaIn(reg(oa,i)[l],h,at);}int nb=k/8;for(int i=0;i<nb;i++)for(int h=0;h<2;h++)B[t*2+h+8*i][g]=mmaIn(reg(ob,i)[l],h,at);}
   else if(at==TF32){int na=k/2;for(int i=0;i<na;i++)A[g+8*(i&1)][t+4*(i>>1)]=tf(reg(oa,i)[l]);int nb=k/4;for(int i=0;i<nb;i++)B[t+4*i][g]=tf(reg(ob,i)[l]);}
   else throw Err(string("mma type ")+where(I));
   if(ct==F32)for(int i=0;i<4;i++)C[g+8*(i>>1)][t*2+(i&1)]=u2f(reg(oc,i)[l]);else for(int i=0;i<2;i++)for(int h=0;h<2;h++)C[g+8*i][t*2+h]=mmaIn(reg(oc,i)[l],h,F16);}
  for(int r=0;r<16;r++){double acc[8];for(int c=0;c<8;c++)acc[c]=C[r][c];for(int q=0;q<k;q++)for(int c=0;c<8;c++)acc[c]+=(double)A[r][q]*(double)B[q][c];for(int c=0;c<8;c++)C[r][c]=perturb?rz(acc[c]):(float)acc[c];}
  for(int l=0;l<32;l++){int g=l/4,t=l%4;if(dt==F32)for(int i=0;i<4;i++)reg(od,i)[l]=f2u(C[g+8*(i>>1)][t*2+(i&1)]);else for(int i=0;i<2;i++)reg(od,i)[l]=f2h(C[g+8*i][t*2])|((u64)f2h(C[g+8*i][t*2+1])<<16);}break;}
 case O_PROXYFENCE:w.fence++;w.fvc=w.vc;break;
 case O_WGCOMMIT:w.wgroups.push_back(std::move(w.wq));w.wq.clear();break;
 case O_WGWAIT:{size_t keep=(size_t)S(0)[0];while(w.wgroups.size()>keep){for(auto&g:w.wgroups.front()){if(late)wgRun(*g.I,w,g.ad,g.bd,g.sd);}w.wgroups.erase(w.wgroups.begin());}
  fill(w.pend.begin(),w.pend.end(),0);w.npend=0;for(auto&gr:w.wgroups)for(auto&g:gr)for(int r:g.I->o[0].v){w.pend[r]=1;w.npend++;}break;}
 case O_WGMMA:{if(m!=~0u)throw Err(string("wgmma: warp not converged ")+where(I));bool areg=I.o[1].k==2;WgOp g{&I,areg?0:S(1)[0],S(2)[0],(S(3)[0]&1)!=0};w.wq.push_back(g);for(int r:I.o[0].v)if(!w.pend[r]){w.pend[r]=1;w.npend++;}if(!late)wgRun(I,w,g.ad,g.bd,g.sd);break;}
 case O_ATOM:case O_RED:{int mi=I.op==O_ATOM?1:0;const Opnd&mem=I.o[mi];u64*a=R(w,mem.r);u64*b=R(w,I.o[mi+1].k==2?I.o[mi+1].v[0]:I.o[mi+1].r);u64*c=I.o.size()>(size_t)mi+2?S(mi+2):nullptr;Ty t=I.t;int sz=tsz(t);
  lanes(m,[&](int l){u64 ad=a[l]+mem.off;if(I.space==2)ad=(u32)ad;bool cr=checkRace;checkRace=false;for(int e=0;e<I.vec;e++){u8*q=ptr(I,w,ad+e*sz,sz,true,l,I.space);u64 old=0;memcpy(&old,q,sz);u64 bv=I.vec>1?R(w,I.o[mi+1].v[e])[l]:b[l];u64 nv=0;
   if(t==F16X2||t==BF16X2){Ty x=t==F16X2?F16:BF16;for(int h=0;h<2;h++)nv|=putf(getf((old>>(16*h))&0xffff,x)+getf((bv>>(16*h))&0xffff,x),x)<<(16*h);}
   else if(isF(t)){double x=t==F64?u2d(old):getf(old,t),y=t==F64?u2d(bv):getf(bv,t);double r=I.sub==1?x+y:I.sub==2?fmin(x,y):I.sub==3?fmax(x,y):y;nv=t==F64?d2u(r):putf((float)r,t);}
   else switch(I.sub){case 1:nv=old+bv;break;case 2:nv=isS(t)?(u64)min(sext(old,sz),sext(bv,sz)):min(old,maskw(bv,sz));break;case 3:nv=isS(t)?(u64)max(sext(old,sz),sext(bv,sz)):max(old,maskw(bv,sz));break;case 4:nv=old&bv;break;case 5:nv=old|bv;break;case 6:nv=old^bv;break;case 7:nv=bv;break;case 8:nv=old==maskw(bv,sz)?c[l]:old;break;case 9:nv=old>=bv?0:old+1;break;default:nv=(old==0||old>bv)?bv:old-1;}
   memcpy(q,&nv,sz);if(I.op==O_ATOM){u64*d=I.o[0].k==2?R(w,I.o[0].v[e]):S(0);d[l]=old;}}checkRace=cr;});break;}
 case O_TRAP:throw Err(string("trap ")+where(I));
 default:throw Err(string("unimplemented ")+where(I));
 }
 (void)act;
}
// ------------------------------------------------------------------ C API
struct Handle{Kernel K;Machine M;string out;};
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
namespace py=pybind11;
struct Program{unique_ptr<Handle> h;};
PYBIND11_MODULE(_ptxsim,mod){
 py::class_<Handle>(mod,"Program").def(py::init([](const string&src,const string&entry){auto h=make_unique<Handle>();int base;{Kernel k0;Parser P;P.s=src;P.dynBase=1<<20;if(!P.parseModule(k0,entry))throw Err("no entry");base=(k0.shStatic+15)/16*16;}Parser P;P.s=src;P.dynBase=base;P.parseModule(h->K,entry);h->M.K=&h->K;return h;}))
 .def_property_readonly("name",[](Handle&h){return h.K.name;})
 .def_property_readonly("params",[](Handle&h){vector<tuple<string,int,int>> r;for(auto&p:h.K.params)r.push_back({p.name,p.off,p.size});return r;})
 .def_property_readonly("param_bytes",[](Handle&h){return h.K.psize;})
 .def("launch",[](Handle&h,array<u32,3> grid,array<u32,3> blk,int dynsmem,py::bytes pb,vector<tuple<u64,u64,bool>> ranges,py::dict o){auto&M=h.M;M.ranges.clear();for(auto&r:ranges){M.ranges.push_back({get<0>(r),get<0>(r)+get<1>(r),get<2>(r)?3:1});M.checkRange=true;}
  auto opt=[&](const char*k,bool d){return o.contains(k)?o[k].cast<bool>():d;};u64 seed=o.contains("seed")?o["seed"].cast<u64>():1;
  M.checkRace=opt("race",true);M.late=opt("late",true);M.poison=opt("poison",true);M.stats=opt("stats",true);M.perturb=opt("perturb",false);M.seed=seed?seed*0x9E3779B97F4A7C15ull|1:88172645463325252ull;M.st=Stats();M.st.dyn.assign(h.K.statNames.size(),0);M.st.perInst.assign(h.K.code.size(),{0,0});M.firstRace.clear();M.firstIntra.clear();
  int base=(h.K.shStatic+15)/16*16;M.sh.assign((size_t)base+dynsmem,0);string params=pb;M.params.assign(params.begin(),params.end());for(int i=0;i<3;i++){M.grid[i]=grid[i];M.blk[i]=blk[i];}
  if(h.K.reqntid&&(int)(blk[0]*blk[1]*blk[2])>h.K.reqntid)throw Err("block exceeds reqntid/maxntid");
  {py::gil_scoped_release g;for(u32 z=0;z<grid[2];z++)for(u32 y=0;y<grid[1];y++)for(u32 x=0;x<grid[0];x++){M.ctaid[0]=x;M.ctaid[1]=y;M.ctaid[2]=z;M.runCta();}}
  auto&s=M.st;py::dict d,f,c,first,dyn;f["shared_race"]=s.races;f["in_flight"]=s.inflight;f["proxy_fence"]=s.proxy;f["intra_warp_race"]=s.intra;f["wgmma_pending"]=s.wgpend;f["uninitialised_shared"]=s.uninit;
  if(!M.firstRace.empty())first["shared_race"]=M.firstRace;if(!M.firstIntra.empty())first["intra_warp_race"]=M.firstIntra;
  c["warp_instructions"]=s.warpInst;c["shared_requests"]=s.shReq;c["shared_wavefronts"]=s.shWave;c["shared_ideal_wavefronts"]=s.shIdeal;c["global_requests"]=s.gReq;c["global_sectors"]=s.gSect;c["global_ideal_sectors"]=s.gIdeal;c["diverged_steps"]=s.diverged;
  for(size_t i=0;i<s.dyn.size();i++)if(s.dyn[i])dyn[h.K.statNames[i].c_str()]=s.dyn[i];
  d["findings"]=f;d["first"]=first;d["counters"]=c;d["opcodes"]=dyn;return d;});
}
